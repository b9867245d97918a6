"""A bandit with a known optimum: one prompt per arm set, one token per answer, and the learner finds the arm that pays most; and what dynamic
sampling does where prompts are of unlike difficulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import call, model_folder, table

from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.schedule import Fate, Refill
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


LEARNERS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {},
    "opo": {},
    "cispo": {},
    "gspo": {"minibatches": 2},
    "ppo": {"critic": {"lr": 1e-2}},
}


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_the_policy_ends_at_the_arm_that_pays_most(tmp_path: Path, name: str) -> None:
    config = LearnerConfig.model_validate({"lr": 5e-3, **LEARNERS[name]})
    learner = Learner(AlgorithmConfig(name=name), config, model_folder(tmp_path / "model"))
    chance = torch.Generator().manual_seed(0)
    assert all(policy(learner, prompt)[arm].exp() < 0.1 for prompt, arm in BEST.items())
    for step in range(1, STEPS + 1):
        spans, batch = pulled(learner, step, chance)
        (payload,) = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
        metrics = learner.train(payload)
        # Once every arm pulled is the best one there is no token to compare.
        assert metrics["tokens_current"] == 0 or metrics["max_logprob_diff"] < 1e-4
    for prompt, arm in BEST.items():
        assert float(policy(learner, prompt)[arm].exp()) > 0.95, (name, prompt)


SLOTS = 6
RIGHT = {prompt: range(number) for prompt, number in enumerate((1, 2, 4, 8, 16, 32, 45, 49))}
"""Prompt token -> the arms that pay 1 of 50: from hardly ever by chance to nearly always."""


def sampled(
    learner: Learner, step: int, chance: torch.Generator, refill: Refill | None
) -> tuple[Any, TrainBatch]:
    """Spans and batch of one step, each slot filled as the run does: a group without signal takes another prompt where there is `refill`."""
    spans, groups = [], []
    for slot in range(SLOTS):
        fate, tries = Fate.AGAIN, 0
        while fate is Fate.AGAIN:
            tries += 1
            prompt = int(torch.randint(len(RIGHT), (), generator=chance))
            logprobs = policy(learner, prompt)
            arms = torch.multinomial(logprobs.exp(), 8, True, generator=chance).tolist()
            rewards = [float(arm in RIGHT[prompt]) for arm in arms]
            signal = len(set(rewards)) > 1
            fate = Fate.TAKE if refill is None else refill.fate(step, rewards, signal=signal)
        if fate is Fate.SHORT:
            continue
        members = []
        for place, (arm, reward) in enumerate(zip(arms, rewards, strict=True)):
            attempt = (f"ro-{step}-{slot}-{place}", "at-1")
            said = {"versions": [(0, step - 1)], "logprobs": [float(logprobs[arm])]}
            spans.append(call("c", [prompt], [arm], attempt=attempt, **said))
            members.append(Member(rollout_id=attempt[0], attempt_id="at-1", reward=reward))
        groups.append(GroupPlan(group_id=f"{step}-{slot}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(groups))


def learnt(folder: Path, zero_signal: str) -> tuple[float, float]:
    """Share of the run's slots that had signal, as the learner counts; and the mean chance to be right in the end."""
    algorithm = AlgorithmConfig.model_validate({"name": "dapo", "zero_signal": zero_signal})
    config = LearnerConfig(lr=5e-3)
    learner = Learner(algorithm, config, folder)
    refill = Refill(4 * SLOTS) if zero_signal == "refill" else None
    chance = torch.Generator().manual_seed(0)
    signal = 0.0
    for step in range(1, STEPS + 1):
        spans, batch = sampled(learner, step, chance, refill)
        (payload,) = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
        metrics = learner.train(payload)
        signal += metrics["groups"] - metrics["zero_signal_groups"]
    right = [policy(learner, prompt).exp()[list(arms)].sum() for prompt, arms in RIGHT.items()]
    return signal / (SLOTS * STEPS), float(torch.stack(right).mean())


def test_dynamic_sampling_raises_the_share_of_groups_with_signal(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (kept, kept_right), (refilled, right) = learnt(folder, "keep"), learnt(folder, "refill")
    assert (
        refilled > kept + 0.2
    )  # 0.88 and 0.56 here: in the end hardly any prompt is answered wrong
    assert kept < 0.65
    assert min(kept_right, right) > 0.9
