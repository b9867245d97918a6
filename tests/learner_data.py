"""Made-up model folders, call spans and batches for the tests of trajectory, algorithms and learner."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agl_ray.spans import span_batch
from agl_ray.spans.schema import ROLE_KIND
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch

VOCABULARY = 50


def model_folder(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    experts: bool = False,
    biases: bool = False,
) -> Path:
    """A random Qwen3 or Qwen3-MoE (hidden 32, 2 layers; `biases` in the attention) with a word tokenizer, as save_pretrained writes them."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    torch.manual_seed(seed)
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = (Qwen3MoeConfig if experts else Qwen3Config)(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        attention_bias=biases,
        **(mixture if experts else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


def call(
    name: str,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    attempt: tuple[str, str] = ("ro-1", "at-1"),
    parent: str | None = None,
    shared: int | None = None,
    versions: Sequence[tuple[int, int]] | None = None,
    logprobs: Sequence[float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A call span. `prompt` is its own part of the prompt; log-probability of response token i is -(i + 1) / 8 unless given."""
    if logprobs is None:
        logprobs = [-(i + 1) / 8 for i in range(len(response))]
    return {
        "rollout_id": attempt[0],
        "attempt_id": attempt[1],
        "span_id": name,
        "name": "chat",
        "kind": "call",
        "start_ns": 0,
        "end_ns": 1,
        "status": "OK",
        "parent_call": parent,
        "parent_tokens": shared,
        "prompt_ids": list(prompt),
        "response_ids": list(response),
        "response_logprobs": list(logprobs),
        "weight_versions": ([(0, 0)] if response else []) if versions is None else list(versions),
        "prompt_tokens": (shared or 0) + len(prompt),
        **more,
    }


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_batches([span_batch(rows)])


def random_batch(
    seed: int, *, step: int = 1, groups: int = 4, group_size: int = 4, spread: float = 0.5
) -> tuple[pa.Table, TrainBatch]:
    """Conversations of 1 to 3 turns, some with a branch; random rewards, all equal in the last group.

    Engine log-probabilities are random around a uniform distribution (standard deviation `spread`), tokens of version `step - 1`.
    """
    rng = np.random.default_rng([seed, step])
    spans: list[dict[str, Any]] = []
    plans = []
    for group in range(groups):
        members = []
        for rollout in range(group_size):
            attempt = (f"ro-{step}-{group}-{rollout}", f"at-{step}-{group}-{rollout}")
            spans += _conversation(rng, attempt, step - 1, spread)
            reward = 1.0 if group == groups - 1 else float(rng.integers(0, 5)) / 3
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=reward))
        plans.append(GroupPlan(group_id=f"g{group}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(plans))


def _conversation(
    rng: np.random.Generator, attempt: tuple[str, str], version: int, spread: float
) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    length, parent = 0, None
    for turn in range(int(rng.integers(1, 4))):
        prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 8))).tolist()
        response = rng.integers(0, VOCABULARY, int(rng.integers(1, 9))).tolist()
        shared = length - int(rng.integers(0, 3) == 0) if parent else None
        logprobs = (-np.log(VOCABULARY) + spread * rng.normal(size=len(response))).tolist()
        spans.append(
            call(
                f"c{turn}", prompt, response, attempt=attempt, parent=parent, shared=shared,
                versions=[(0, version)], logprobs=logprobs,
            )
        )  # fmt: skip
        length, parent = (shared or 0) + len(prompt) + len(response), f"c{turn}"
    return spans


def branching_batch(
    seed: int, *, step: int = 1, groups: int = 3, group_size: int = 3, turns: int = 4
) -> tuple[pa.Table, TrainBatch]:
    """Rollouts that begin with their group's prompt; every turn leaves out some of the answer before it, so that it begins a row of its own;
    a side question beside every other one. The first two rollouts of a group begin with the same call, of other log-probabilities."""
    rng = np.random.default_rng([seed, step, 7])
    spans: list[dict[str, Any]] = []
    plans = []

    def drawn(most: int) -> list[int]:
        return rng.integers(0, VOCABULARY, int(rng.integers(1, most))).tolist()

    for group in range(groups):
        prompt, answer = drawn(12), drawn(9)
        members = []
        for rollout in range(group_size):
            attempt = (f"ro-{step}-{group}-{rollout}", f"at-{step}-{group}-{rollout}")
            length, parent = 0, None
            for turn in range(turns):
                asked, said = (drawn(6), drawn(9)) if turn else (prompt, drawn(9))
                if turn == 0 and rollout < 2:
                    said = answer
                shared = length if parent else None
                for name, own, made in [(f"c{turn}", asked, said)] + [
                    (f"s{turn}", drawn(5), drawn(7))
                ] * (turn % 2):
                    logprobs = -np.log(VOCABULARY) + 0.5 * rng.normal(size=len(made))
                    spans.append(
                        call(
                            name, own, made, attempt=attempt, parent=parent, shared=shared,
                            versions=[(0, step - 1)], logprobs=logprobs.tolist(),
                        )
                    )  # fmt: skip
                length, parent = (
                    (shared or 0) + len(asked) + int(rng.integers(1, len(said) + 1)),
                    f"c{turn}",
                )
            reward = float(rng.integers(0, 5)) / 3 + rollout
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=reward))
        plans.append(GroupPlan(group_id=f"g{group}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(plans))


def roles_batch(
    seeds: Mapping[str, int],
    *,
    step: int = 1,
    frozen: Collection[str] = (),
    groups: int = 3,
    group_size: int = 3,
) -> tuple[pa.Table, TrainBatch]:
    """Rollouts in which each role of `seeds` speaks twice, in a conversation of its own, drawn with its own seed: another seed gives a role
    other tokens, as many of them. Rewards are of the step alone. frozen: roles that are not trained."""
    lengths, rewards = np.random.default_rng([step, 1]), np.random.default_rng([step, 2])
    rngs = {role: np.random.default_rng([seed, step, 3]) for role, seed in seeds.items()}
    spans: list[dict[str, Any]] = []
    plans = []
    for group in range(groups):
        members = []
        for rollout in range(group_size):
            attempt = (f"ro-{step}-{group}-{rollout}", f"at-{step}-{group}-{rollout}")
            asked, said = lengths.integers(1, 9, (2, 2)).tolist()
            for role, rng in rngs.items():
                length, parent = 0, None
                for turn in range(2):
                    prompt, response = (
                        rng.integers(0, VOCABULARY, n).tolist() for n in (asked[turn], said[turn])
                    )
                    logprobs = -np.log(VOCABULARY) + 0.5 * rng.normal(size=len(response))
                    spans.append(
                        call(
                            f"{role}-{turn}", prompt, response, attempt=attempt, parent=parent,
                            shared=length if parent else None, versions=[(0, step - 1)],
                            logprobs=logprobs.tolist(), role=role,
                            attributes={ROLE_KIND: "frozen"} if role in frozen else {},
                        )
                    )  # fmt: skip
                    length, parent = length + asked[turn] + said[turn], f"{role}-{turn}"
            reward = float(rewards.integers(0, 5)) / 3 + rollout
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=reward))
        plans.append(GroupPlan(group_id=f"g{group}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(plans))
