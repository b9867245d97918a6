"""`agl-ray store`: which store is meant, what is listed and shown, what is dropped, and mistakes in one paragraph."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl_ray.cli import main
from agl_ray.cli.store_clear import moment_of
from agl_ray.cli.store_target import target_of
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.types import EndReason, InputError, Rollout

Made = list[Rollout]


def spans(key: tuple[str, str]) -> Any:
    common = {"rollout_id": key[0], "attempt_id": key[1], "start_ns": 0, "end_ns": 1_500_000}
    agent = {"span_id": "a", "name": "agent", "kind": "span", "status": "OK"}
    call = {"span_id": "b", "parent_id": "a", "name": "model.call", "kind": "call", "status": "OK"}
    call |= {"prompt_ids": [1, 2, 3], "response_ids": [4], "prompt_tokens": 3, "response_tokens": 1}
    call |= {"finish_reason": "stop", "weight_versions": [(0, 7)]}
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add [1]"}]
    tool = {"function": {"name": "look", "arguments": '{"what": "1"}'}}
    call["attributes"] = {
        "request": {"messages": asked},
        "response": {"role": "assistant", "content": None, "tool_calls": [tool]},
    }
    broken = {"span_id": "c", "parent_id": "b", "name": "tool", "kind": "span", "status": "ERROR"}
    broken |= {"status_message": "no [such] tool"}
    reward = {"span_id": "d", "name": "reward", "kind": "reward", "status": "OK", "reward": 0.5}
    return span_batch([row | common for row in (agent, call, broken, reward)])


async def fill(store: LightningStore) -> Made:
    """Steps 0 to 3 of two rollouts each, all ended; one waits."""
    made = []
    for i in range(8):
        rollout = await store.start_rollout({"q": f"[{i}]"}, "train", metadata={"step": i // 2})
        key = (rollout.rollout_id, rollout.attempt_id)
        await store.add_spans(*key, spans(key))
        if i % 4 == 3:
            await store.end_attempt(*key, EndReason.AGENT_ERROR, error="it [broke]")
        else:
            await store.end_attempt(*key, EndReason.OK, reward=0.5)
        made.append(rollout.rollout)
    made.append(await store.enqueue_rollout({"q": "waits"}, "val"))
    return made


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A run folder with a store, `runs/latest` pointing at it."""
    folder = tmp_path / "runs" / "small-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "runs" / "latest").symlink_to("small-1")

    async def make() -> Made:
        core = await StoreCore.open(f"sqlite:///{folder}/store.db")
        made = await fill(LightningStore.local(core))
        await core.close()
        return made

    made = asyncio.run(make())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return made


@pytest.fixture
def alive(runs: Made, tmp_path: Path) -> Iterator[None]:
    """The run of `runs`, with a store that owns its journal."""
    loop = asyncio.new_event_loop()
    core = loop.run_until_complete(StoreCore.open(f"sqlite:///{tmp_path}/runs/small-1/store.db"))
    yield
    loop.run_until_complete(core.close())
    loop.close()


def out(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["store", *words]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(out(capsys, *words, "--json"))


@pytest.mark.parametrize("verb", ["ls", "show", "export", "import", "gc", "rotate", "serve"])
def test_every_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, verb, "--help")
    assert "Example" in text
    assert f"agl-ray store {verb}" in text


def test_a_run_is_a_folder_a_name_a_file_or_a_url(runs: Made, tmp_path: Path) -> None:
    file = tmp_path / "runs" / "small-1" / "store.db"
    for name in ("latest", "small-1", "runs/latest", "runs/small-1", str(file)):
        assert target_of(name).url == f"sqlite:///{file}"
    url = "postgresql://me:secret@host/db"
    assert target_of(url, run_id="mine").settings.run_id == "mine"
    assert "secret" not in target_of(url).shown


def test_a_run_says_itself_where_its_store_is(runs: Made, tmp_path: Path) -> None:
    config = tmp_path / "runs" / "small-1" / "config.json"
    config.write_text(json.dumps({"store": {"url": "sqlite:///elsewhere.db", "cache_mib": 1}}))
    assert target_of("latest").url == "sqlite:///elsewhere.db"
    config.write_text(json.dumps({"store": {"url": None, "encryption": "fernet"}}))
    assert target_of("latest").settings.encryption == "fernet"
    assert target_of("latest", encryption="aes-gcm").settings.encryption == "aes-gcm"


def test_ls_lists_runs(runs: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    os.utime(broken, (1, 1))
    text = out(capsys, "ls")
    assert "small-1" in text
    assert "no store.db" in text
    first, second = answer(capsys, "ls")
    assert (first["run"], first["rollouts"]) == ("broken", None)
    assert (second["run"], second["rollouts"], second["ok"]) == ("small-1", 9, 6)
    assert (second["other_ends"], second["spans"]) == (2, 32)


def test_ls_lists_rollouts(runs: Made, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "ls", "latest")
    assert all(one.rollout_id in text for one in runs)
    assert "[3]" in text  # no markup
    assert "agent_error" in text
    ids = [one.rollout_id for one in runs]
    assert [row["rollout_id"] for row in answer(capsys, "ls", "latest")] == ids[::-1]
    assert [row["rollout_id"] for row in answer(capsys, "ls", "latest", "--oldest")] == ids
    failed = answer(capsys, "ls", "latest", "--status", "failed", "--limit", "1")
    assert [row["rollout_id"] for row in failed] == [ids[7]]
    assert failed[0]["latest_attempt"]["error"] == "it [broke]"
    (waiting,) = answer(capsys, "ls", "latest", "--mode", "val", "--limit", "0")
    assert (waiting["status"], waiting["latest_attempt"]) == ("queuing", None)


def test_a_living_run_is_read_beside_its_owner(
    alive: None, runs: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "alive" in out(capsys, "ls")
    assert "is alive" in out(capsys, "ls", "latest")
    assert runs[0].rollout_id in out(capsys, "show", runs[0].rollout_id)
    out(capsys, "export", "latest", "--out", str(tmp_path / "out"))
    assert "is alive" in out(capsys, "gc", "latest", "--keep-steps", "1", code=2)
    assert "would drop 6" in out(capsys, "gc", "latest", "--keep-steps", "1", "--dry-run")


def test_a_pipe_cuts_nothing_off_and_a_narrow_terminal_no_name(
    runs: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "small-1" in out(capsys, "ls")
    text = out(capsys, "ls", "latest")
    assert all(one.rollout_id in text for one in runs)
    assert '{"q": "waits"}' in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = out(capsys, "ls", "latest")
    assert all(one.rollout_id in text for one in runs)
    assert "waits" not in text
    assert "expected one of" in out(capsys, "ls", "latest", "--mode", "validation", code=2)


def test_show_has_attempts_spans_and_errors(runs: Made, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "show", runs[3].rollout_id)
    for part in ("agent_error", "it [broke]", "3 + 1 tokens", "weights 7", "no [such] tool"):
        assert part in text
    assert "reward 0.5 (primary)" in text
    assert "user: add [1]" in text
    assert "assistant: look(what='1')" in text
    assert "be brief" not in text  # a system prompt
    places = {
        name: next(line.index(name) for line in text.splitlines() if f"  {name}  " in line)
        for name in ("agent", "model.call", "tool")
    }
    assert places["agent"] < places["model.call"] < places["tool"]  # a tree


def test_show_takes_the_beginning_of_an_id(runs: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rollout_id = runs[0].rollout_id
    shown = answer(capsys, "show", rollout_id[:10])
    assert shown["rollout_id"] == rollout_id
    (attempt,) = shown["attempts"]
    assert [row["span_id"] for row in attempt["spans"]] == ["a", "b", "c", "d"]
    assert attempt["spans"][1]["response_ids"] == [4]
    assert "there is no rollout 'ro-'" in out(capsys, "show", "ro-", code=2)
    assert "there is no rollout" in out(capsys, "show", "ro-nothing", code=2)


def test_export_and_import(runs: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = out(capsys, "export", "latest", "--out", "exported")
    assert "spans.parquet" in text
    assert "imported into" in out(capsys, "import", "exported", "sqlite:///back.db")
    ids = [one.rollout_id for one in runs]
    rows = answer(capsys, "ls", "back.db", "--oldest")
    assert [row["rollout_id"] for row in rows] == ids
    again = out(capsys, "import", "exported", "sqlite:///back.db", code=2)
    assert "not empty" in again
    assert "not empty" in out(capsys, "export", "latest", "--out", "exported", code=2)


def test_gc_drops_what_the_rules_name(
    runs: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = answer(capsys, "gc", "latest", "--keep-steps", "2", "--dry-run")
    assert (told["rollouts"], told["spans"]) == (4, 16)
    assert told["span_bytes"] > 0
    done = answer(capsys, "gc", "latest", "--keep-steps", "2")
    assert (done["rollouts"], done["spans"]) == (4, 16)
    assert done["file_after"] <= done["file_before"]
    left = [row["rollout_id"] for row in answer(capsys, "ls", "latest", "--oldest")]
    assert left == [one.rollout_id for one in runs[4:]]
    assert answer(capsys, "gc", "latest", "--older-than", "1d")["rollouts"] == 0
    both = answer(capsys, "gc", "latest", "--finished-before", "2100-01-01", "--keep-steps", "1")
    assert both["rollouts"] == 2
    rest = answer(capsys, "gc", "latest", "--finished-before", "2100-01-01")
    assert rest["rollouts"] == 2
    (waiting,) = answer(capsys, "ls", "latest")
    assert waiting["rollout_id"] == runs[-1].rollout_id


def test_gc_gives_the_space_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def make() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        store = LightningStore.local(core)
        for i in range(5):
            rollout = await store.start_rollout({"i": i})
            key = (rollout.rollout_id, rollout.attempt_id)
            row = {"rollout_id": key[0], "attempt_id": key[1], "span_id": "a", "name": "a"}
            row |= {"kind": "call", "start_ns": 0, "end_ns": 1, "status": "OK"}
            await store.add_spans(*key, span_batch([row | {"prompt_ids": list(range(100_000))}]))
            await store.end_attempt(*key, EndReason.OK, reward=1.0)
        await core.close()

    asyncio.run(make())
    text = out(capsys, "gc", str(tmp_path / "store.db"), "--finished-before", "2100-01-01")
    assert "dropped 5 rollouts" in text
    assert (tmp_path / "store.db").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["ls", "nowhere"], "there is no run nowhere"),
        (["ls", "nowhere.db"], "there is no store file"),
        (["ls", "sqlite:///nowhere.db"], "no such file"),
        (["ls", "memory://"], "nothing to read"),
        (["ls", "ftp://x"], "store.url"),
        (["ls", "latest", "--status", "dancing"], "expected one of"),
        (["ls", "--mode", "val"], "need a RUN"),
        (["ls", "--runs-dir", "nowhere"], "there are no runs"),
        (["ls", "latest", "--encryption", "rot13"], "encryption"),
        (["gc", "latest"], "say what may go"),
        (["gc", "latest", "--older-than", "soon"], "expected an age"),
        (["import", "nowhere", "sqlite:///x.db"], "manifest.json"),
        (["import", "nowhere", "x.db"], "expected a URL"),
        (["export", "latest", "--out", "runs"], "not empty"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    runs: Made, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = out(capsys, *words, code=2)
    assert part in text
    assert "Traceback" not in text


def test_ages_and_dates() -> None:
    assert moment_of("--x", "2d", now=1_000_000.0) == 1_000_000.0 - 2 * 86400
    assert moment_of("--x", "1.5h", now=10_000.0) == 4_600.0
    assert moment_of("--x", "2001-01-01T00:00:00+00:00") == 978307200.0
    with pytest.raises(InputError, match="--x: expected an age"):
        moment_of("--x", "7 days")
