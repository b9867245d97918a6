"""Deaths behind and of the gateway: a killed engine replica costs a retry, a killed gateway costs nothing that was acknowledged."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_fakes import TOOL
from gateway_system import System, start

FALLBACK_PORT = 8500  # Serve's, unless it is told another one


class Stranger(BaseHTTPRequestHandler):
    """The gateway of another run of this machine: it knows none of our rollouts."""

    def do_POST(self) -> None:
        self.send_error(404, "rollout is not known to this stranger")

    do_GET = do_POST


@contextlib.contextmanager
def stranger() -> Iterator[None]:
    """Somebody at the port where Serve's fallback is by default."""
    try:
        server = ThreadingHTTPServer(("0.0.0.0", FALLBACK_PORT), Stranger)
    except OSError:  # another cluster's Serve is there: a stranger, too
        yield
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def system(scratch: Path) -> Iterator[System]:
    with stranger():
        running = start(scratch / "k", engines=2)
        yield running
        running.stop()


def say(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def pids(system: System, one: Any, number: int) -> set[str]:
    """The processes of the engine replicas that so many calls of an attempt, one continuing the other, were answered by."""
    client = system.client(one)
    messages: list[Any] = []
    found = set()
    for _ in range(number):
        messages.append(say("pid"))
        message = client.chat.completions.create(model="tiny", messages=messages).choices[0].message
        messages.append(message)
        found.add(str(message.content))
    return found


def test_the_calls_of_a_rollout_stick_to_one_replica_while_it_lives(system: System) -> None:
    attempts = [system.attempt() for _ in range(10)]
    homes = [pids(system, one, 3) for one in attempts]
    assert [len(home) for home in homes] == [1] * len(attempts)
    assert len(set.union(*homes)) == 2, "ten rollouts at one replica, the other idle"
    lost = attempts[0]
    answer = system.client(lost).chat.completions.create(model="tiny", messages=[say("die home")])
    assert answer.choices[0].message.content == "home"
    assert not pids(system, lost, 1) & homes[0]
    stayed = [n for n, home in enumerate(homes) if home != homes[0]]
    assert [pids(system, attempts[n], 1) for n in stayed] == [homes[n] for n in stayed]


def test_a_call_whose_engine_dies_is_answered_by_the_next_one(system: System) -> None:
    """The client does not retry; the gateway does."""
    one = system.attempt()
    answer = system.client(one).chat.completions.create(model="tiny", messages=[say("die early")])
    assert answer.choices[0].message.content == "early"
    chunks = system.client(one).chat.completions.create(
        model="tiny", messages=[say("die again")], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "again"
    state = system.state(one)
    assert (state["calls"], state["engine_errors"]) == (2, 0)


def test_a_killed_gateway_goes_on_where_it_was(system: System) -> None:
    one = system.attempt()
    client = system.client(one, max_retries=0, timeout=60)
    messages: list[Any] = [say("call 47+385")]
    first = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    message = first.choices[0].message
    messages += [
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "432"},
    ]
    messages.append(say("say 432"))
    system.ask("kill_gateway")
    deadline = time.monotonic() + 240
    while True:
        try:
            second = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
            break
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < deadline, "no gateway came back"
            time.sleep(0.5)
    assert second.choices[0].message.content == "432"
    spans = system.spans(one)
    assert spans[1]["parent_call"] == spans[0]["span_id"]
    assert spans[1]["parent_tokens"] == len(spans[0]["prompt_ids"]) + len(spans[0]["response_ids"])
    assert [span["attributes"]["agl.retokenized_tokens"] for span in spans] == [0, 0]
    state = system.state(one)
    assert (state["calls"], state["retokenized_tokens"], state["branches"]) == (2, 0, 0)
