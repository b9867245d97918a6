"""A whole run with a trained role, a frozen one on a vLLM of its own and a model outside, each rollout in a process of its own, judged
by a pool, credit by call: only the trained role's tokens are trained, on the judge's and the agent's rewards, and the frozen role never changes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_fakes import chat, endpoint

from agl_ray.cli.store_target import opened, target_of
from agl_ray.store.payload import rows_of
from agl_ray.tracing.names import OBJECT_JSON, OBJECT_SPAN
from tests.faults.whole_run import REPO, WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

AGENT = REPO / "tests" / "integration" / "agents_for_tests.py"


def spans_of(folder: Path) -> list[dict[str, Any]]:
    """The spans of the training rollouts of a finished run, each with its rollout's step, member and reward."""

    async def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with opened(target_of(str(folder))) as archive:
            async for page in archive.rollouts(mode="train"):
                of = {
                    rollout.rollout_id: {
                        "step": rollout.metadata["step"],
                        "member": rollout.metadata["group_index"],
                    }
                    for rollout, *_ in page
                    if "step" in rollout.metadata
                }
                async for table in archive.spans(await archive.span_totals(list(of))):
                    found += [{**row, **of[row["rollout_id"]]} for row in rows_of(table)]
        return found

    return asyncio.run(read())


def off_by(folder: Path, calls: list[dict[str, Any]]) -> float:
    """Largest |difference| between the log-probabilities that the engine recorded for these calls and those of the model in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    largest = 0.0
    for call in calls:
        prompt, response = list(call["prompt_ids"]), list(call["response_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        mine = torch.log_softmax(logits, -1)[range(len(response)), response]
        largest = max(largest, float(abs(mine.numpy() - call["response_logprobs"]).max()))
    return largest


def file_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_only_the_trained_role_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_TEST_FAR_KEY", "sk-far")
    base = make(tmp_path / "model")
    before = file_hash(base)
    with endpoint(chat("fine")) as far:
        judge = f"{{kind: endpoint, base_url: '{far.url}/v1', model: far, api_key_env: AGL_TEST_FAR_KEY}}"
        extra = [
            f"agent={AGENT}:three_roles",
            f"roles={{planner: train, critic: frozen, judge: {judge}}}",
            f"judge.function={AGENT}:judge_of_plans",
            *("runners.isolation=process", "runners.num_runners=1", "credit.unit=call"),
            *("train.steps=2", "validation.rows=4", "learner.lr=0.01"),
        ]
        run = WholeRun(tmp_path, base, extra).start()
        try:
            assert run.finish() == 0, run.text
        finally:
            run.close()
        assert run.left_over() == []
        assert {headers["authorization"] for _, headers, _ in far.requests} == {"Bearer sk-far"}
    spans = spans_of(run.run_folder)
    calls: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        if span["kind"] == "call":
            calls.setdefault(span["role"], []).append(span)
    assert set(calls) == {"planner", "critic", "judge"}
    for call in calls["planner"]:
        assert {version for _, version in call["weight_versions"]} == {call["step"] - 1}
    assert {version for call in calls["critic"] for _, version in call["weight_versions"]} == {0}
    assert all(not call["response_ids"] for call in calls["judge"])
    lines = (run.run_folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for step, metrics in enumerate(map(json.loads, lines), start=1):
        mine = [call for call in calls["planner"] if call["step"] == step]
        assert metrics["tokens_of_batch"] == sum(len(call["response_ids"]) for call in mine)
        assert metrics["calls_frozen"] == 2 * len(mine)
        assert metrics["max_logprob_diff"] < 1e-3
        check_credit(metrics, mine)
    check_rewards(spans, calls["planner"])
    check_processes(spans)
    check_weights(base, run.run_folder / "export", calls)
    assert file_hash(base) == before
    assert "sk-far" not in (run.run_folder / "config.json").read_text()


def check_credit(metrics: dict[str, Any], plans: list[dict[str, Any]]) -> None:
    """A unit for each of the planner's calls, with the verdict and what the agent gave that very call."""
    assert metrics["units"] == metrics["rewards_of_parts"] == len(plans) == 16
    assert metrics["rewards_unplaced"] == 0
    given = np.mean([0.1 * call["member"] for call in plans])
    assert metrics["reward_role.planner"] == pytest.approx(metrics["reward"] + given)
    assert metrics["zero_signal_groups"] == 0  # the calls' own rewards differ in every group


def check_rewards(spans: list[dict[str, Any]], plans: list[dict[str, Any]]) -> None:
    """Each rollout's reward is the judge's, by what the planner said; each plan has the agent's."""
    said = {call["rollout_id"]: call["attributes"]["response"]["content"] for call in plans}
    rewards = [span for span in spans if span["kind"] == "reward"]
    whole = {one["rollout_id"]: one["reward"] for one in rewards if one["reward_target"] is None}
    assert whole == {name: float(sum(text.encode()) % 2) for name, text in said.items()}
    assert {0.0, 1.0} == set(whole.values())
    of_calls = {one["reward_target"]: one["reward"] for one in rewards if one["reward_target"]}
    assert of_calls == {call["span_id"]: pytest.approx(0.1 * call["member"]) for call in plans}


def check_processes(spans: list[dict[str, Any]]) -> None:
    told = [span["attributes"] for span in spans if span["name"] == OBJECT_SPAN]
    pids = [attributes[OBJECT_JSON] for attributes in told]
    assert len(pids) == len(set(pids)) == 32


def check_weights(base: Path, trained: Path, calls: dict[str, list[dict[str, Any]]]) -> None:
    """The frozen role answered with the base model's weights to the end; the trained one with others from its second step on."""
    later = {role: [call for call in calls[role] if call["step"] == 2][:4] for role in calls}
    assert off_by(base, later["critic"]) < 1e-3
    assert off_by(trained, later["critic"]) > 1e-2
    assert off_by(base, later["planner"]) > 1e-2
    assert file_hash(base) != file_hash(trained)
