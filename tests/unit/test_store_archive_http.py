"""A running store read through its door: listed, shown and exported as its journal would be, with a key, and clear errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from http_store import Served, served

from agl_ray.cli import main
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, archive_http
from agl_ray.store.archive import open_archive
from agl_ray.types import LLM, EndReason

KEY = "open sesame"


def span(key: tuple[str, str], name: str) -> Any:
    row = {"rollout_id": key[0], "attempt_id": key[1], "span_id": name, "name": name}
    row |= {"kind": "call", "start_ns": 1, "end_ns": 2, "status": "OK", "prompt_ids": [1, 2]}
    return span_batch([row])


async def fill(store: LightningStore) -> list[str]:
    """Seven rollouts: five ended (one at its second attempt), one open, one waiting."""
    ids = []
    first = await store.add_resources({"m": LLM(endpoint="http://a", model="m")})
    await store.add_resources({"m": LLM(endpoint="http://b", model="m")})
    await store.update_resources(
        first.resources_id, {"m": LLM(endpoint="http://c", model="m")}
    )  # the latest
    await store.put_state("position", b"\x00\xff")
    for i in range(6):
        made = await store.start_rollout({"i": i}, "val" if i % 2 else "train", worker_id="w")
        key = (made.rollout_id, made.attempt_id)
        await store.add_spans(*key, span(key, f"s{i}"))
        if i == 2:
            await store.end_attempt(*key, EndReason.LOST, error="gone")
            (again,) = await store.dequeue_many_rollouts(worker_id="w")
            key = (again.rollout_id, again.attempt_id)
            await store.add_spans(*key, span(key, "s2 again"))
        if i < 5:
            await store.end_attempt(*key, EndReason.OK, reward=float(i))
        ids.append(made.rollout_id)
    ids.append((await store.enqueue_rollout({"i": 6})).rollout_id)
    return ids


@pytest.fixture
def door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Served, list[str], Path]]:
    """(the served store, its rollouts, its file)"""
    monkeypatch.setenv("AGL_STORE_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "store.db"
    with served(f"sqlite:///{path}", api_key=KEY) as running:
        ids = asyncio.run(fill(running.client(KEY)))
        yield running, ids, path


def out(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["store", *words]) == code, capsys.readouterr()
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def journalled(attempt: dict[str, Any]) -> dict[str, Any]:
    """Without what the journal is not told (heartbeats) and what a client is not (batches of spans)."""
    for row in attempt.get("spans", ()):
        del row["batch_id"]
    kept = ("last_heartbeat_time", "lease_until")
    return {name: value for name, value in attempt.items() if name not in kept}


def test_ls_and_show_say_what_the_file_says(
    door: tuple[Served, list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    running, ids, path = door
    assert "5 succeeded" in out(capsys, "ls", running.url)
    assert "alive" in out(capsys, "ls", running.url)
    for words in (["--oldest"], ["--limit", "3"], ["--status", "succeeded", "--mode", "val"]):
        through = json.loads(out(capsys, "ls", running.url, *words, "--json"))
        beside = json.loads(out(capsys, "ls", str(path), *words, "--json"))
        for row in (*through, *beside):
            row["latest_attempt"] = journalled(row["latest_attempt"] or {})
        assert through == beside
    show = json.loads(out(capsys, "show", ids[2][:10], "--run", running.url, "--json"))
    names = [[row["name"] for row in one["spans"]] for one in show["attempts"]]
    assert names == [["s2"], ["s2 again"]]
    beside = json.loads(out(capsys, "show", ids[2], "--run", str(path), "--json"))
    for one in (show, beside):
        one["attempts"] = [journalled(attempt) for attempt in one["attempts"]]
    assert show == beside
    assert "there is no rollout" in out(capsys, "show", "ro-none", "--run", running.url, code=2)


def test_an_export_goes_back_into_a_store(
    door: tuple[Served, list[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, ids, path = door
    monkeypatch.setattr(archive_http, "SPANS_AT_ONCE", 2)
    monkeypatch.setattr(archive_http, "PAGE", 2)
    through, beside = str(tmp_path / "through"), str(tmp_path / "beside")
    out(capsys, "export", running.url, "--out", through)
    out(capsys, "export", str(path), "--out", beside)
    for name in ("rollouts", "attempts", "resources", "workers", "state", "spans"):
        one, other = (pq.read_table(f"{of}/{name}.parquet") for of in (through, beside))
        # What a client is not told, and what a file is not.
        loose = {"created", "queue_position", "update_number", "batch_id"}
        loose |= {name for name in one.schema.names if name.startswith(("last_", "lease_"))}
        loose |= {"heartbeat_stats"}
        kept = [name for name in one.schema.names if name not in loose]
        if name == "attempts":  # those of a page of rollouts are in order of ids
            one, other = (table.sort_by("attempt_id") for table in (one, other))
        assert one.select(kept).equals(other.select(kept)), name
    out(capsys, "import", through, f"sqlite:///{tmp_path}/back.db")
    rows = json.loads(out(capsys, "ls", str(tmp_path / "back.db"), "--oldest", "--json"))
    assert [row["rollout_id"] for row in rows] == ids

    async def latest() -> str:
        async with open_archive(f"sqlite:///{tmp_path}/back.db") as opened:
            assert opened.live.latest_resources is not None
            return opened.live.latest_resources.body.decode()

    assert "http://c" in asyncio.run(latest())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["ls", "URL", "--run-id", "x"], "--run-id"),
        (["ls", "URL", "--encryption", "fernet"], "--encryption"),
        (["gc", "URL", "--keep-steps", "1"], "cleared by its journal"),
        (["ls", "http://127.0.0.1:1"], "no store answers there"),
        (["ls", "http://"], "expected http://host:port"),
    ],
)
def test_mistakes_are_one_paragraph(
    words: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archive_http, "AWAY_SECONDS", 0.1)
    with served() as running:
        text = out(capsys, *[running.url if word == "URL" else word for word in words], code=2)
    assert part in text
    assert "Traceback" not in text


def test_another_key_is_refused(
    door: tuple[Served, list[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGL_STORE_API_KEY", "wrong")
    assert "another API key" in out(capsys, "ls", door[0].url, code=2)
