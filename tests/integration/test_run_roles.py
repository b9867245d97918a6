"""A whole run with a trained role, a frozen one on a vLLM of its own and a model outside: only the trained role's tokens are trained."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from endpoint_fakes import chat, endpoint

from agl_ray.cli.store_target import opened, target_of
from agl_ray.store.payload import rows_of
from tests.faults.whole_run import REPO, WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

AGENT = REPO / "tests" / "integration" / "agents_for_tests.py"


def spans_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The calls of the training rollouts of a finished run, by role."""

    async def read() -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        async with opened(target_of(str(folder))) as archive:
            async for page in archive.rollouts(mode="train"):
                steps = {
                    rollout.rollout_id: rollout.metadata["step"]
                    for rollout, *_ in page
                    if "step" in rollout.metadata
                }
                async for table in archive.spans(await archive.span_totals(list(steps))):
                    for row in rows_of(table):
                        if row["kind"] == "call":
                            of = found.setdefault(row["role"], [])
                            of.append({**row, "step": steps[row["rollout_id"]]})
        return found

    return asyncio.run(read())


def test_only_the_trained_role_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_TEST_FAR_KEY", "sk-far")
    with endpoint(chat("fine")) as far:
        judge = f"{{kind: endpoint, base_url: '{far.url}/v1', model: far, api_key_env: AGL_TEST_FAR_KEY}}"
        extra = [
            f"agent={AGENT}:three_roles",
            f"roles={{planner: train, critic: frozen, judge: {judge}}}",
            *("train.steps=2", "validation.rows=4", "runners.num_runners=1"),
        ]
        run = WholeRun(tmp_path, make(tmp_path / "model"), extra).start()
        try:
            assert run.finish() == 0, run.text
        finally:
            run.close()
        assert run.left_over() == []
        assert {headers["authorization"] for _, headers, _ in far.requests} == {"Bearer sk-far"}
    calls = spans_of(run.run_folder)
    assert set(calls) == {"planner", "critic", "judge"}
    for call in calls["planner"]:
        assert {version for _, version in call["weight_versions"]} == {call["step"] - 1}
    assert {version for call in calls["critic"] for _, version in call["weight_versions"]} == {0}
    assert all(not call["response_ids"] for call in calls["judge"])
    lines = (run.run_folder / "metrics.jsonl").read_text().splitlines()
    for step, metrics in enumerate(map(json.loads, lines), start=1):
        mine = [call for call in calls["planner"] if call["step"] == step]
        assert metrics["tokens_of_batch"] == sum(len(call["response_ids"]) for call in mine)
        assert metrics["calls_frozen"] == 2 * len(mine)
        assert metrics["max_logprob_diff"] < 1e-3
    assert "sk-far" not in (run.run_folder / "config.json").read_text()
