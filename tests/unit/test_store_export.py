"""Exports: whole, streamed, readable by other programs, and back again as they were."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agl_ray.spans import SPAN_SCHEMA, span_batch
from agl_ray.store import LightningStore, StoreCore, archive, export, importing
from agl_ray.store.archive import open_archive
from agl_ray.store.export import export_store
from agl_ray.store.importing import import_store
from agl_ray.types import LLM, EndReason, InputError, PromptTemplate, RolloutConfig

HEX = "0123456789abcdef"


def spans(rollout_id: str, attempt_id: str, *numbers: int) -> pa.RecordBatch:
    """Every third one is a model call, every fifth a reward."""
    rows: list[dict[str, Any]] = []
    for i in numbers:
        row: dict[str, Any] = {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "span_id": f"{i:016x}",
            "parent_id": f"{i - 1:016x}" if i else None,
            "name": "step",
            "kind": "span",
            "start_ns": 1_000 * i,
            "end_ns": 1_000 * i + 500,
            "status": "OK",
            "attributes": {"n": i, "text": "a" * 10},
        }
        if i % 3 == 0:
            row |= {
                "kind": "call",
                "prompt_ids": list(range(i, i + 20)),
                "response_ids": [1, 2, 3],
                "response_logprobs": [-0.5, -0.25, -1.0],
                "weight_versions": [(0, 1), (2, 2)],
                "prompt_tokens": 20,
            }
        elif i % 5 == 0:
            row |= {"kind": "reward", "reward": 0.5, "reward_dimension": "primary"}
        rows.append(row)
    return span_batch(rows)


async def a_little_of_everything(store: LightningStore) -> None:
    """Resources of two versions; 12 rollouts: finished, failed, running, waiting, one tried twice."""
    first = await store.add_resources({"llm": LLM(endpoint="http://x", model="m")})
    await store.update_resources(first.resources_id, {"p": PromptTemplate(template="{a}")})
    config = RolloutConfig(max_attempts=2, retry_condition=("agent_error",))
    for i in range(12):
        await store.enqueue_rollout(
            {"i": i, "text": "e-acute \u00e9"}, "train", None, config, {"step": i // 4}
        )
    for i in range(9):
        taken = await store.dequeue_rollout(worker_id=f"w{i % 2}")
        assert taken is not None
        key = (taken.rollout_id, taken.attempt_id)
        await store.add_spans(*key, spans(*key, *range(i + 1)), batch_id="one")
        await store.add_spans(*key, spans(*key, i + 1, i + 2), batch_id="two")
        if i < 6:
            await store.end_attempt(*key, EndReason.OK, reward=float(i))
        elif i == 6:
            await store.end_attempt(*key, EndReason.AGENT_ERROR, error="it broke")
    await store.put_state("position", b"\x00\xff not text")


async def everything(store: LightningStore) -> dict[str, Any]:
    """All that a store answers, for comparing two of them."""
    rollouts = [getattr(one, "rollout", one) for one in await store.query_rollouts()]
    attempts = [
        attempt for one in rollouts for attempt in await store.query_attempts(one.rollout_id)
    ]
    keys = [(one.rollout_id, one.attempt_id) for one in attempts]
    return {
        "rollouts": rollouts,
        "attempts": [
            (one.attempt_id, one.sequence_id, one.status, one.reward, one.error, one.num_spans)
            for one in attempts
        ],
        "spans": (await store.read_spans(keys)).to_pylist(),
        "resources": await store.get_latest_resources(),
        "workers": [one.worker_id for one in await store.query_workers()],
        "state": await store.get_state("position"),
    }


async def filled(url: str) -> dict[str, Any]:
    core = await StoreCore.open(url)
    store = LightningStore.local(core)
    await a_little_of_everything(store)
    found = await everything(store)
    await core.close()
    return found


async def exported(url: str, folder: Path) -> dict[str, int]:
    async with open_archive(url) as opened:
        return await export_store(opened, folder, url)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """(URL, export, everything in it)"""
    folder = tmp_path_factory.mktemp("made")
    url = f"sqlite:///{folder}/store.db"
    found = asyncio.run(filled(url))
    asyncio.run(exported(url, folder / "out"))
    return url, folder / "out", found


def test_an_export_holds_everything(made: tuple[str, Path, dict[str, Any]]) -> None:
    _, out, found = made
    manifest = json.loads((out / "manifest.json").read_text())
    rows = manifest["rows"]
    assert rows == {
        "rollouts": 12,
        "attempts": 9,
        "spans": len(found["spans"]),
        "resources": 1,
        "workers": 2,
        "state": 1,
    }
    for name, number in rows.items():
        file = pq.ParquetFile(out / f"{name}.parquet")
        assert file.metadata.num_rows == number
        assert file.schema_arrow.remove_metadata() == export.SCHEMAS[name]
    table = pq.read_table(out / "spans.parquet").select(SPAN_SCHEMA.names)
    key = lambda row: (row["rollout_id"], row["sequence_id"])  # noqa: E731
    assert sorted(table.to_pylist(), key=key) == sorted(found["spans"], key=key)
    assert not list(out.glob(".*"))


def test_spans_are_compressed_in_row_groups(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 20)
    monkeypatch.setattr(archive, "SPAN_BYTES", 1)
    asyncio.run(exported(made[0], tmp_path / "out"))
    file = pq.ParquetFile(tmp_path / "out" / "spans.parquet")
    assert file.metadata.num_row_groups > 2
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    whole = pq.read_table(made[1] / "spans.parquet")
    assert file.read().equals(whole)


def test_pandas_reads_it(made: tuple[str, Path, dict[str, Any]]) -> None:
    pandas = importlib.import_module("pandas")
    frame = pandas.read_parquet(made[1] / "spans.parquet")
    calls = frame[frame.kind == "call"]
    assert list(calls.iloc[0].prompt_ids) == list(range(20))
    attempts = pandas.read_parquet(made[1] / "attempts.parquet")
    assert attempts.reward.sum() == 15.0
    assert set(attempts.end_reason.dropna()) == {"ok", "agent_error"}


def test_polars_reads_it(made: tuple[str, Path, dict[str, Any]]) -> None:
    polars = importlib.import_module("polars")
    frame = polars.scan_parquet(made[1] / "spans.parquet")
    calls = frame.filter(polars.col("kind") == "call")
    lengths = calls.select(polars.col("prompt_ids").list.len()).collect()["prompt_ids"]
    assert set(lengths) == {20}
    rollouts = polars.read_parquet(made[1] / "rollouts.parquet")
    inputs = rollouts["input"].str.json_decode(polars.Struct({"i": polars.Int64}))
    assert inputs.struct.field("i").to_list() == list(range(12))


def test_duckdb_reads_it(made: tuple[str, Path, dict[str, Any]]) -> None:
    duckdb = importlib.import_module("duckdb")
    out = made[1]
    found = duckdb.sql(
        f"""
        SELECT a.reward, count(*), sum(len(s.response_ids)), any_value(s.attributes['n'])
        FROM '{out}/attempts.parquet' a JOIN '{out}/spans.parquet' s USING (rollout_id, attempt_id)
        WHERE a.end_reason = 'ok' GROUP BY ALL ORDER BY a.reward
        """
    ).fetchall()
    assert [row[:3] for row in found][:2] == [(0.0, 3, 3), (1.0, 4, 6)]
    metadata = duckdb.sql(f"SELECT metadata->>'step' FROM '{out}/rollouts.parquet'").fetchall()
    assert metadata[:5] == [("0",)] * 4 + [("1",)]


def test_an_import_is_the_store_it_came_from(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "SPAN_ROWS", 7)  # batches cross the pieces that are read
    monkeypatch.setattr(importing, "RECORDS", 5)
    url = f"sqlite:///{tmp_path}/back.db"

    async def scenario() -> None:
        rows = await import_store(made[1], url)
        assert rows == json.loads((made[1] / "manifest.json").read_text())["rows"]
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        assert await everything(store) == made[2]
        waiting = [one.rollout_id for one in made[2]["rollouts"] if one.status.waiting]
        new = await store.enqueue_rollout({"i": 12})
        taken = await store.dequeue_many_rollouts(limit=10)
        order = [one.rollout_id for one in taken]
        assert order[-1] == new.rollout_id
        assert set(order[:-1]) == set(waiting)
        first = made[2]["rollouts"][0]
        (attempt,) = await store.query_attempts(first.rollout_id)
        key = (first.rollout_id, attempt.attempt_id)
        again = await store.add_spans(*key, spans(*key, 1, 2), batch_id="two")
        assert again == [2, 3]  # a repetition, known by its batch
        await core.close()

    asyncio.run(scenario())


def test_spans_without_batches_come_back_too(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]]
) -> None:
    """Somebody wrote them anew, with wider types and without our own column."""
    out = tmp_path / "out"
    out.mkdir()
    for file in made[1].iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(out / "spans.parquet").drop_columns(["batch_id"])
    wide = pa.list_(pa.int64())
    place = table.schema.get_field_index("prompt_ids")
    table = table.set_column(place, "prompt_ids", table.column("prompt_ids").cast(wide))
    pq.write_table(table, out / "spans.parquet")

    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/back.db"
        await import_store(out, url)
        core = await StoreCore.open(url)
        assert (await everything(LightningStore.local(core)))["spans"] == made[2]["spans"]
        await core.close()

    asyncio.run(scenario())


def test_an_import_wants_an_empty_store(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match="not empty"):
        asyncio.run(import_store(made[1], made[0]))
    url = f"sqlite:///{tmp_path}/state.db"

    async def only_state() -> None:
        core = await StoreCore.open(url)
        await LightningStore.local(core).put_state("a", b"1")
        await core.close()

    asyncio.run(only_state())
    with pytest.raises(InputError, match="not empty"):
        asyncio.run(import_store(made[1], url))


def test_an_empty_store_exports_and_imports(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        await core.close()
        rows = await exported(url, tmp_path / "out")
        assert set(rows.values()) == {0}
        assert await import_store(tmp_path / "out", f"sqlite:///{tmp_path}/b.db") == rows

    asyncio.run(scenario())


def test_an_export_wants_an_empty_folder(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        asyncio.run(exported(made[0], tmp_path))
    with pytest.raises(InputError, match="cannot be made"):
        asyncio.run(exported(made[0], tmp_path / "mine.txt" / "out"))


def test_a_broken_export_is_refused(tmp_path: Path, made: tuple[str, Path, dict[str, Any]]) -> None:
    out = tmp_path / "out"

    def copy() -> None:
        out.mkdir(exist_ok=True)
        for file in made[1].iterdir():
            (out / file.name).write_bytes(file.read_bytes())

    def refused(match: str) -> None:
        url = f"sqlite:///{tmp_path}/{len(list(tmp_path.iterdir()))}-{match[:3]}.db"
        with pytest.raises(InputError, match=match) as caught:
            asyncio.run(import_store(out, url))
        assert "\n" not in str(caught.value)

    refused("there is no manifest.json")
    copy()
    (out / "manifest.json").write_text('{"format": 99}')
    refused("its format is 99")
    copy()
    (out / "attempts.parquet").unlink()
    refused("attempts.parquet is missing")
    copy()
    (out / "rollouts.parquet").write_bytes(b"PAR1 not really")
    refused("cannot be read")
    copy()
    rollouts = pq.read_table(out / "rollouts.parquet")
    pq.write_table(rollouts.drop_columns(["input"]), out / "rollouts.parquet")
    refused("column 'input' is missing")
    copy()
    pq.write_table(rollouts.slice(0, 3), out / "rollouts.parquet")
    refused("has 3 rows")
    copy()
    wrong = rollouts.set_column(6, "status", pa.array(["dancing"] * 12))
    pq.write_table(wrong, out / "rollouts.parquet")
    refused("does not fit")


def test_a_broken_export_leaves_no_file_under_its_name(
    tmp_path: Path, made: tuple[str, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(rows: Any) -> Any:
        raise InputError("no more")

    monkeypatch.setattr(archive, "span_table", fails)
    with pytest.raises(InputError, match="no more"):
        asyncio.run(exported(made[0], tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
