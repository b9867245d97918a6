"""A bandit with a known optimum: one prompt per arm set, one token per answer, and the learner finds the arm that pays most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import call, model_folder, table

from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch

BEST = {3: 11, 4: 37}
"""Prompt token -> the arm (response token) that pays 1. Ten others pay a fifth of it, the rest nothing."""
GROUP_SIZE = 64
STEPS = 40


def pays(prompt: int, arm: int) -> float:
    return 1.0 if arm == BEST[prompt] else 0.2 * (arm % 5 == 0)


@torch.no_grad()
def policy(learner: Learner, prompt: int) -> torch.Tensor:
    """log pi over the arms, [VOCABULARY]."""
    logits = learner.model(input_ids=torch.tensor([[prompt]]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), -1)


def pulled(learner: Learner, step: int, chance: torch.Generator) -> tuple[Any, TrainBatch]:
    """Spans and batch of one step: arms drawn from the learner's own policy."""
    spans, groups = [], []
    for number, prompt in enumerate(BEST):
        logprobs = policy(learner, prompt)
        arms = torch.multinomial(logprobs.exp(), GROUP_SIZE, True, generator=chance).tolist()
        members = []
        for place, arm in enumerate(arms):
            attempt = (f"ro-{step}-{number}-{place}", f"at-{step}-{number}-{place}")
            said = {"versions": [(0, step - 1)], "logprobs": [float(logprobs[arm])]}
            spans.append(call("c", [prompt], [arm], attempt=attempt, **said))
            members.append(
                Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=pays(prompt, arm))
            )
        groups.append(GroupPlan(group_id=f"{step}-{number}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(groups))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_policy_ends_at_the_arm_that_pays_most(tmp_path: Path, name: str) -> None:
    config = LearnerConfig(lr=5e-3)
    learner = Learner(AlgorithmConfig(name=name), config, model_folder(tmp_path / "model"))
    chance = torch.Generator().manual_seed(0)
    assert all(policy(learner, prompt)[arm].exp() < 0.1 for prompt, arm in BEST.items())
    for step in range(1, STEPS + 1):
        spans, batch = pulled(learner, step, chance)
        (payload,) = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
        metrics = learner.train(payload)
        assert metrics["max_logprob_diff"] < 1e-4
    for prompt, arm in BEST.items():
        assert float(policy(learner, prompt)[arm].exp()) > 0.95, (name, prompt)
