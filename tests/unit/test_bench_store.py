"""The store's benchmark: every number it can give has a meaning, its journals with a past are journals, its flows lose nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agl_ray.bench import store as bench
from agl_ray.bench import store_keys, store_show
from agl_ray.bench.peers import agentlightning_env as agentlightning
from agl_ray.bench.store_fill import attempt_id_of, fill, rollout_ids
from agl_ray.bench.store_flow import StoreFlows, run_flows
from agl_ray.bench.store_growth import OPERATIONS, measure_growth, worst
from agl_ray.bench.store_load import CALLS_PER_ATTEMPT, calls
from agl_ray.bench.store_naive import NaiveStore
from agl_ray.bench.store_places import in_process
from agl_ray.types import InputError, RolloutStatus, RunError


def test_a_filled_journal_is_a_store_with_that_past(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        await fill(url, 30)
        async with in_process(url) as place:
            counts = await place.store.statistics()
            assert counts["rollouts_by_status"]["succeeded"] == 27
            assert counts["rollouts_by_status"]["failed"] == 3
            assert (counts["spans"], counts["queue"]) == (60, 0)
            first, *_, last = rollout_ids(30)
            rollout = await place.store.get_rollout_by_id(last)
            assert rollout is not None
            assert rollout.status is RolloutStatus.FAILED
            rows = (await place.store.read_spans([(first, attempt_id_of(first))])).to_pylist()
            assert [row["sequence_id"] for row in rows] == [1, 2]
            assert {row["rollout_id"] for row in rows} == {first}

    asyncio.run(scenario())


def test_ids_of_a_smaller_store_are_the_first_of_a_larger() -> None:
    assert list(rollout_ids(50))[:20] == list(rollout_ids(20))


def test_growth_times_every_operation_at_every_size(tmp_path: Path) -> None:
    table, opened = asyncio.run(measure_growth(tmp_path, (20, 40), rounds=2))
    assert table.keys() == OPERATIONS.keys()
    assert all(set(times) == {20, 40} and min(times.values()) > 0 for times in table.values())
    assert set(opened) == {20, 40}
    ratio, name = worst({"a": {20: 1.0, 40: 2.0}, "b": {20: 1.0, 40: 3.0}}, 40, 20)
    assert (ratio, name) == (3.0, "b")


@pytest.mark.parametrize("profile", ["light", "single", "together", "heavy"])
def test_flows_are_counted_by_the_store_itself(profile: str) -> None:
    async def scenario() -> None:
        async with in_process("memory://") as place:
            found = await run_flows(StoreFlows(place.store, profile), place.pid, 12, 4)
            assert found.per_s > 0
            assert found.p50_ms <= found.p99_ms

    asyncio.run(scenario())


def test_a_store_that_loses_spans_gives_no_number() -> None:
    class Forgetful(StoreFlows):
        async def totals(self) -> tuple[int, int]:
            succeeded, spans = await super().totals()
            return succeeded, max(0, spans - 1)

    async def scenario() -> None:
        async with in_process("memory://") as place:
            await run_flows(Forgetful(place.store, "light"), place.pid, 3, 1)

    with pytest.raises(RunError, match="expected"):
        asyncio.run(scenario())


def test_calls_are_weighed_on_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "store.db"
        number = 3 * CALLS_PER_ATTEMPT
        async with in_process(f"sqlite:///{file}") as place:
            assert (await calls(place, number)).calls_per_s > 0
        assert 40_000 < file.stat().st_size / number < 60_000

    asyncio.run(scenario())


def test_the_naive_store_takes_each_rollout_once() -> None:
    async def scenario() -> None:
        store = NaiveStore()
        made = await store.enqueue_rollout({"i": 0})
        taken = await store.dequeue_rollout("w")
        assert taken is not None
        assert taken["rollout_id"] == made["rollout_id"]
        assert await store.dequeue_rollout("w") is None
        await store.add_span({"rollout_id": made["rollout_id"]})
        await store.update_attempt(made["rollout_id"], taken["attempt_id"], "succeeded")
        assert await store.totals() == (1, 1)

    asyncio.run(scenario())


def numbers() -> dict[str, Any]:
    cases = [*store_keys.FLOWS, *store_keys.PEER_FLOWS]
    found: dict[str, Any] = {
        f"flow_{case.name}_{key}": 1.0 + i
        for i, case in enumerate(cases)
        for key in store_keys.FLOW_KEYS
    }
    return found | bench._ratios(found) | {"growth_statistics_1000_ms": 1.0, "open_1000_s": 0.1}


def test_names_of_cases_are_unique_and_ratios_name_cases() -> None:
    names = [case.name for case in [*store_keys.FLOWS, *store_keys.PEER_FLOWS]]
    assert len(set(names)) == len(names)
    assert {name for pair in store_keys.RATIOS.values() for name in pair} <= set(names)
    ratios = set(store_keys.RATIOS) | set(store_keys.CPU_RATIOS)
    assert ratios == set(bench._ratios(numbers()))
    assert ratios <= set(store_keys.KEYS)


def test_tables_show_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    store_show.show_store(numbers())
    text = capsys.readouterr().out
    assert "peer_http_heavy_32" in text
    assert "flow_heavy_ratio_http" in text
    assert "1,000" in text


def test_pip_that_fails_is_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        text = (
            "WARNING: retrying\nERROR: No matching distribution found for agentlightning==0.3.0\n"
        )
        return subprocess.CompletedProcess(command, 1, "", text)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(InputError, match="No matching distribution") as caught:
        agentlightning.environment(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def works(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", works)
    python = agentlightning.environment(tmp_path)
    assert len(commands) == 2
    assert "opentelemetry-sdk==1.39.1" in commands[1]
    assert agentlightning.environment(tmp_path) == python
    assert len(commands) == 2


def test_the_peers_answer_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "PYTHONPATH" not in options["env"]
        assert json.loads(command[-1])["cases"] == [["http", "light", 1, 5]]
        return subprocess.CompletedProcess(command, 0, 'noise\n[{"per_s": 2.0}]\n', "")

    monkeypatch.setattr(subprocess, "run", answers)
    case = agentlightning.Case("http", "light", 1, 5)
    assert agentlightning.measure(tmp_path, [case]) == [{"per_s": 2.0}]
