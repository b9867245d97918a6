"""A student's own rollouts for tests of on-policy distillation: drawn token by token from the learner's model. Test code only."""

from __future__ import annotations

from typing import Any

import torch
from learner_data import call, table

from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch


@torch.no_grad()
def own_rollouts(
    learner: Learner,
    step: int,
    *,
    vocabulary: int,
    prompts: int,
    each: int,
    tokens: int,
) -> tuple[Any, TrainBatch]:
    """Spans and batch of one step: `each` answers of `tokens` tokens to the same `prompts` prompts of two tokens; every reward is 0."""
    chance = torch.Generator().manual_seed(step)
    asked = torch.arange(2 * prompts).reshape(prompts, 2) + 10
    ids = asked.repeat_interleave(each, 0)
    logprobs = []
    for _ in range(tokens):
        logits = learner.model(input_ids=ids, use_cache=False).logits[:, -1, :vocabulary]
        every = torch.log_softmax(logits.double(), -1)
        drawn = torch.multinomial(every.exp(), 1, generator=chance)
        logprobs.append(every.gather(1, drawn))
        ids = torch.cat([ids, drawn], 1)
    said = torch.cat(logprobs, 1).tolist()
    spans, groups = [], []
    for prompt in range(prompts):
        members = []
        for place in range(prompt * each, (prompt + 1) * each):
            attempt = (f"ro-{step}-{place}", f"at-{step}-{place}")
            row = ids[place].tolist()
            more: dict[str, Any] = {"versions": [(0, step - 1)], "logprobs": said[place]}
            spans.append(call("c", row[:2], row[2:], attempt=attempt, **more))
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=0.0))
        groups.append(GroupPlan(group_id=f"{step}-{prompt}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(groups))
