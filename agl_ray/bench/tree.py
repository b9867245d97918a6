"""A training step with `trajectory.rows: tree` against the same step with merge-prefix: tokens run forward, and CPU time.

The agent has ten turns. Its model thinks before it answers, and its chat template leaves old thoughts out of the history, so that every turn
begins a row of its own; now and then it asks a side question. The rollouts of a group have their first prompt in common.
The model is the one of bench/learner.py. A step is what rank 0 does with the spans: rows, packing, forward, backward, optimiser. Both
sides must come to the same gradient norm.
Called by bench/trajectory.py; alone: `agl-ray bench trajectory --quick`.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.bench.learner import VOCABULARY, make_model
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.spans import span_batch
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.types import InputError, RunError

Numbers = dict[str, Any]
SAME = ("grad_norm", "tokens_trained", "tokens_of_batch")


class Agent(NamedTuple):
    """Tokens of the first prompt, and of each turn: what is asked, thoughts, answer. side: of a side question and of its answer, on every
    `side_every`-th turn. rollouts of each of `groups` groups."""

    turns: int = 10
    first: int = 200
    asked: int = 60
    thoughts: int = 40
    answer: int = 30
    side: int = 40
    side_every: int = 3
    rollouts: int = 2
    groups: int = 2


QUICK = Agent(first=40, asked=12, thoughts=8, answer=6, side=8, groups=1)

KEYS = {
    "tree_tokens_ratio": "tokens run forward of a step, merge-prefix / tree",
    "tree_time_ratio": "CPU seconds of a step, merge-prefix / tree",
    "tree_step_s": "CPU seconds of a step with trajectory.rows: tree (the fastest one)",
    "tree_rows_step_s": "the same with merge-prefix",
    "tree_layout_s": "CPU seconds of these that rows and packing take, tree",
    "tree_tokens": "tokens run forward, tree",
    "tree_rows_tokens": "the same, merge-prefix",
    "tree_trained_tokens": "tokens that are trained in the step, the same on both sides",
}


def measure(quick: bool = False) -> Numbers:
    """The numbers of KEYS, on one core. Steps of both sides take turns. InputError: no torch. RunError: the two sides do not do the same work."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(
            "bench trajectory: a training step needs torch: pip install 'agl-ray[learn]'"
        ) from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            make_model(Path(folder))
            return _compare(Path(folder), QUICK if quick else Agent(), repeat=1 if quick else 2)
    finally:
        torch.set_num_threads(threads)


def _compare(folder: Path, agent: Agent, repeat: int) -> Numbers:
    spans, batch = made_up(agent)
    sides = {rows: _Side(folder, rows) for rows in ("merge-prefix", "tree")}
    for _ in range(repeat + 1):  # the first step is slower
        found = [side.step(spans, batch) for side in sides.values()]
        for name in SAME:
            linear, tree = (metrics[name] for metrics in found)
            if abs(linear - tree) > 1e-4 * abs(linear):
                raise RunError(
                    f"bench tree: expected the same {name} of merge-prefix and tree, got {linear} and {tree}"
                )
    linear_s, tree_s = (min(side.seconds[1:]) for side in sides.values())
    return {
        "tree_tokens_ratio": found[0]["tokens_forward"] / found[1]["tokens_forward"],
        "tree_time_ratio": linear_s / tree_s,
        "tree_step_s": tree_s,
        "tree_rows_step_s": linear_s,
        "tree_layout_s": min(sides["tree"].layout_seconds),
        "tree_tokens": found[1]["tokens_forward"],
        "tree_rows_tokens": found[0]["tokens_forward"],
        "tree_trained_tokens": found[0]["tokens_trained"],
    }


class _Side:
    """A learner that lays out its batches as `rows` says; seconds: CPU time of its steps so far."""

    def __init__(self, folder: Path, rows: str) -> None:
        from agl_ray.learner.step import Learner

        self.trajectory = TrajectoryConfig.model_validate({"rows": rows})
        self.config = LearnerConfig(max_row_tokens=1 << 20, lr=1e-5)
        self.learner = Learner(AlgorithmConfig(correction="none"), self.config, folder)
        self.seconds: list[float] = []
        self.layout_seconds: list[float] = []

    def step(self, spans: pa.Table, batch: TrainBatch) -> dict[str, float]:
        from agl_ray.learner.prepare import lay_out

        begin = time.process_time()
        now = TrainBatch(step=self.learner.version + 1, groups=batch.groups)
        (payload,) = lay_out(
            spans, now, self.learner.algorithm, self.config, world_size=1, seed=0, trajectory=self.trajectory
        )  # fmt: skip
        self.layout_seconds.append(time.process_time() - begin)
        metrics = self.learner.train(payload)
        self.seconds.append(time.process_time() - begin)
        return metrics


def made_up(agent: Agent) -> tuple[pa.Table, TrainBatch]:
    """The spans of the agent's rollouts, as the gateway records them, and their batch."""
    rng = np.random.default_rng(0)
    batches, plans = [], []
    for group in range(agent.groups):
        first = rng.integers(0, VOCABULARY, agent.first)
        members = []
        for number in range(agent.rollouts):
            attempt = {"rollout_id": f"ro-{group}-{number}", "attempt_id": f"at-{group}-{number}"}
            batches.append(span_batch(_rollout(rng, agent, first, attempt)))
            members.append(Member(reward=float(number), **attempt))
        plans.append(GroupPlan(group_id=f"g{group}", members=tuple(members)))
    return pa.Table.from_batches(batches), TrainBatch(step=1, groups=tuple(plans))


def _rollout(
    rng: np.random.Generator, agent: Agent, first: np.ndarray, attempt: dict[str, str]
) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []

    def call(name: str, parent: str | None, shared: int, prompt: np.ndarray, made: int) -> int:
        """Adds a call; the tokens of its whole prompt."""
        spans.append(
            {
                **attempt, "span_id": name, "name": "model.call", "kind": "call", "model": "m", "dialect": "openai.chat",
                "start_ns": 0, "end_ns": 1, "status": "OK", "parent_call": parent, "parent_tokens": shared if parent else None,
                "prompt_ids": prompt.tolist(), "response_ids": rng.integers(0, VOCABULARY, made).tolist(),
                "response_logprobs": (-rng.random(made)).tolist(), "weight_versions": [(0, 0)], "finish_reason": "stop",
                "prompt_tokens": shared + len(prompt), "response_tokens": made, "attributes": {},
            }
        )  # fmt: skip
        return shared + len(prompt)

    length, parent = 0, None
    for turn in range(agent.turns):
        # the answer before, told again without its thoughts, and what is asked now
        told = agent.answer + agent.asked
        own = rng.integers(0, VOCABULARY, told) if turn else first
        length = call(f"c{turn}", parent, length, own, agent.thoughts + agent.answer)
        parent = f"c{turn}"
        if turn % agent.side_every == agent.side_every - 1:
            question = rng.integers(0, VOCABULARY, agent.side)
            call(f"s{turn}", parent, length, question, agent.side)
    return spans
