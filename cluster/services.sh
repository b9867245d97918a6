#!/usr/bin/env bash
# A private PostgreSQL for tests, from Debian's packages: its data, its log and its port live in DIR and nowhere else.
#
#   cluster/services.sh start DIR   make it (or start the one that is in DIR again, on its old port); prints the line of `env`
#   cluster/services.sh stop DIR [fast|immediate]   stop exactly that server; its data stay in DIR
#   cluster/services.sh env DIR     print AGL_TEST_POSTGRES_URL=postgresql://...
#
# Listens on 127.0.0.1 alone, with a password. Root may not run PostgreSQL, so for root it runs as `postgres` (or `nobody`),
# who must be able to reach DIR. Run by tests/services.py; by hand: eval "export $(cluster/services.sh start /tmp/pg)".
set -euo pipefail

usage() { sed -n '2,9p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2; exit 2; }
fail() { echo "services.sh: $*" >&2; exit 1; }

[ $# -ge 2 ] || usage
verb="$1" dir="$(mkdir -p "$2" && cd "$2" && pwd)" mode="${3:-fast}"
data="$dir/data" log="$dir/postgres.log" url_file="$dir/url" port_file="$dir/port"

find_bin() { # the newest installed server, or nothing
  local found
  found="$(ls -d /usr/lib/postgresql/*/bin/postgres 2>/dev/null | sort -t/ -k5 -V | tail -n 1)"
  [ -n "$found" ] || found="$(command -v postgres || true)"
  if [ -n "$found" ]; then dirname "$found"; fi
}

install_server() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "no PostgreSQL server here. Install one (Debian, Ubuntu: apt-get install postgresql), or set AGL_TEST_POSTGRES_URL"
  echo "services.sh: installing PostgreSQL from the distribution's packages" >&2
  export DEBIAN_FRONTEND=noninteractive
  # Without the cluster that the package makes by itself: it would take port 5432.
  local conf=/etc/postgresql-common/createcluster.d/agl-ray.conf
  { apt-get update -q && apt-get install -q -y --no-install-recommends postgresql-common &&
    mkdir -p "$(dirname "$conf")" && echo "create_main_cluster = false" >"$conf" &&
    apt-get install -q -y --no-install-recommends postgresql; } >&2 ||
    fail "apt-get could not install postgresql; install it by hand, or set AGL_TEST_POSTGRES_URL"
  rm -f "$conf"
}

server_user() {
  if [ "$(id -u)" != 0 ]; then id -un; return; fi
  getent passwd postgres nobody | head -n 1 | cut -d: -f1
}

as_server() { # run a command as the server's user
  if [ "$(id -u)" = 0 ]; then
    (cd / && exec setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups -- env HOME=/ "$@")
  else
    (cd / && exec "$@")
  fi
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

running() { [ -s "$data/postmaster.pid" ] && as_server "$bin/pg_ctl" -D "$data" status >/dev/null 2>&1; }

make_data() {
  if [ "$(id -u)" = 0 ]; then chown "$user" "$dir"; fi
  as_server test -w "$dir" ||
    fail "user $user cannot reach $dir: a folder above it is closed to others; choose another DIR (TMPDIR)"
  local password
  password="$(python3 -c 'import secrets; print(secrets.token_hex(12))')"
  (umask 077 && echo "$password" >"$dir/password")
  if [ "$(id -u)" = 0 ]; then chown "$user" "$dir/password"; fi
  as_server "$bin/initdb" -D "$data" -U agl -A scram-sha-256 --pwfile="$dir/password" \
    -E UTF8 --no-locale --data-checksums >"$dir/initdb.log" 2>&1 ||
    fail "initdb failed: $(tail -n 3 "$dir/initdb.log")"
}

start_server() { # on the port in $1
  as_server "$bin/pg_ctl" -D "$data" -l "$log" -w -t 60 start \
    -o "-p $1 -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=100" \
    </dev/null >"$dir/pg_ctl.log" 2>&1
}

start() {
  if [ -z "$bin" ]; then
    install_server
    bin="$(find_bin)"
    [ -n "$bin" ] || fail "postgresql was installed, but no server is in /usr/lib/postgresql or on PATH"
    user="$(server_user)" # the package makes one
  fi
  if running; then cat "$url_file"; return; fi
  [ -s "$data/PG_VERSION" ] || make_data
  if [ -s "$port_file" ]; then
    start_server "$(cat "$port_file")" || fail "PostgreSQL did not start again: $(tail -n 3 "$log")"
  else
    local port try
    for try in 1 2 3 4 5; do # somebody else may take the port before the server does
      port="$(free_port)"
      if start_server "$port"; then echo "$port" >"$port_file"; break; fi
    done
    [ -s "$port_file" ] || fail "PostgreSQL did not start ($try tries): $(tail -n 3 "$log")"
    (umask 077 && echo "AGL_TEST_POSTGRES_URL=postgresql://agl:$(cat "$dir/password")@127.0.0.1:$port/postgres" >"$url_file")
  fi
  cat "$url_file"
}

stop() {
  if running; then
    as_server "$bin/pg_ctl" -D "$data" -m "$mode" -w -t 60 stop >"$dir/pg_ctl.log" 2>&1 ||
      fail "PostgreSQL did not stop: $(tail -n 3 "$dir/pg_ctl.log")"
  fi
}

bin="$(find_bin)"
user="$(server_user)"
case "$verb" in
  start) start ;;
  stop) stop ;;
  env) [ -s "$url_file" ] || fail "$dir has no server; start one first"; cat "$url_file" ;;
  *) usage ;;
esac
