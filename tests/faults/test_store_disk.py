"""The default journal's file: its disk fills up under load, and a killed store leaves half a record at its end."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from store_load import Seen, check
from test_store_postgres_faults import sit_and_be_killed

from agl_ray.store import StoreCore
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import StoreError

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("full_disk.py")
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT = 'mount -t tmpfs -o size=16m tmpfs "$0"'


def test_a_full_disk_is_said_and_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    """A file system with 4 MiB left. When it has space again the store takes up its work again by itself."""
    tried = subprocess.run([*OWN_MOUNTS, "sh", "-c", MOUNT, str(tmp_path)], check=False)
    if tried.returncode != 0:
        pytest.skip("this kernel lets nobody mount; tests/unit/test_store_core.py limits the file")
    run = f'{MOUNT} && exec {sys.executable} {PROGRAM} "$0"'
    path = os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", run, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    error, said = done.stdout.strip().splitlines()
    assert "the disk is full; free some space" in error
    assert said.startswith("well")


def test_half_a_record_at_the_end_costs_nothing_and_damage_before_is_said(tmp_path: Path) -> None:
    """What is behind the last whole commit was never acknowledged. Damage before it is no work of a crash."""
    url, seen = f"sqlite:///{tmp_path}/store.db", Seen()
    sit_and_be_killed(url, "default", 0, seen, random.Random(7))
    log = tmp_path / "store.db-wal"
    content = bytearray(log.read_bytes())
    (page,) = struct.unpack(">I", content[8:12])
    salts, end = bytes(content[16:24]), 32
    while content[end + 8 : end + 16] == salts:
        end += 24 + page
    half = struct.pack(">II", 3, 9) + salts + os.urandom(1000)
    damaged = bytearray(content[:end])
    damaged[end // 2] ^= 1
    log.write_bytes(damaged)
    with pytest.raises(StoreError, match="commits behind the damage"):
        asyncio.run(StoreCore.open(url, must_exist=True))
    log.write_bytes(content[:end] + half)
    counted = asyncio.run(check(url, JournalSettings(), seen))
    assert counted["spans"] >= len(seen.spans) > 0
