"""An export crosses journals: from SQLite into PostgreSQL, looked at and cleared there, and out again the same."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from agl_ray.cli import main
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.types import LLM, EndReason

pytest_plugins = ["services"]

FILES = ("rollouts", "attempts", "spans", "resources", "workers", "state")


async def make(url: str) -> list[str]:
    core = await StoreCore.open(url)
    store = LightningStore.local(core)
    await store.add_resources({"llm": LLM(endpoint="http://x", model="m")})
    await store.put_state("position", b"\x00\xff")
    ids = []
    for i in range(6):
        rollout = await store.start_rollout({"i": i}, "train", metadata={"step": i}, worker_id="w")
        key = (rollout.rollout_id, rollout.attempt_id)
        row: dict[str, Any] = {"rollout_id": key[0], "attempt_id": key[1], "name": "call"}
        row |= {"kind": "call", "start_ns": 1, "end_ns": 2, "status": "OK", "span_id": "a"}
        await store.add_spans(*key, span_batch([row | {"prompt_ids": list(range(2000))}]))
        await store.end_attempt(*key, EndReason.OK, reward=float(i))
        ids.append(rollout.rollout_id)
    ids.append((await store.enqueue_rollout({"i": 6})).rollout_id)
    await core.close()
    return ids


def test_there_and_back(
    tmp_path: Path, postgres_url: str, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = asyncio.run(make(f"sqlite:///{tmp_path}/store.db"))
    there = [postgres_url, "--run-id", run_id]

    def store(*words: str) -> str:
        assert main(["store", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    store("export", str(tmp_path / "store.db"), "--out", str(tmp_path / "out"))
    store("import", str(tmp_path / "out"), *there)
    rows = json.loads(store("ls", *there, "--oldest", "--json"))
    assert [row["rollout_id"] for row in rows] == ids
    assert "2000 + 0 tokens" in store("show", ids[0], "--run", *there)
    store("export", *there, "--out", str(tmp_path / "back"))
    for name in FILES:
        one, other = (pq.read_table(tmp_path / of / f"{name}.parquet") for of in ("out", "back"))
        assert one.equals(other), name
    assert json.loads(store("gc", *there, "--keep-steps", "2", "--json"))["rollouts"] == 4
    rows = json.loads(store("ls", *there, "--oldest", "--json"))
    assert [row["rollout_id"] for row in rows] == ids[4:]
