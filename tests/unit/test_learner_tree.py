"""Rows as a tree: log-probabilities and gradients are those of the rows one by one, for every algorithm, cut and number of updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_data import branching_batch, call, model_folder, random_batch, table
from test_learner_packing import gradients, row_by_row, tiny_model, unpacked

from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner import attention
from agl_ray.learner.attention import NAME
from agl_ray.learner.packing import Packed, pack, pack_tree, token_logprobs
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import InputError


def branching_rows(seed: int = 2, number: int = 12) -> Rows:
    """Rows that leave each other here and there; one is there twice, one is the beginning of another."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, 9).tolist()]
    for _ in range(number):
        stem = ids[int(rng.integers(len(ids)))]
        more = rng.integers(0, 50, int(rng.integers(1, 8))).tolist()
        ids.append(stem[: int(rng.integers(0, len(stem) + 1))] + more)
    ids += [ids[1], ids[2][:3], [7]]
    weights = [rng.integers(0, 2, len(row)) for row in ids]
    temperature = [rng.uniform(0.5, 2.0, len(row)) for row in ids]
    return Rows.from_lists(ids, weights, temperature=temperature)


@pytest.mark.parametrize("tokens", [1, 8, 20, 1000])
@pytest.mark.parametrize("window", [None, 4])
def test_a_tree_equals_its_rows_one_by_one(tokens: int, window: int | None) -> None:
    more: dict[str, Any] = {}
    if window is not None:
        more = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    model, rows = tiny_model(attn_implementation=NAME, **more), branching_rows()
    rows = Rows(rows.ids, rows.lengths, rows.weights)
    weight = torch.from_numpy(np.random.default_rng(5).normal(size=len(rows.ids)))
    expected = row_by_row(model, rows)
    expected_gradients = gradients(model, (expected * weight).sum())
    packs = pack_tree(rows, tokens)
    values = unpacked(rows, packs, [token_logprobs(model, micro) for micro in packs])
    got_gradients = gradients(model, (values * weight).sum())
    torch.testing.assert_close(values.double(), expected, atol=5e-6, rtol=0)
    for got, want in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    held = sum(micro.num_tokens for micro in packs)
    assert held < len(rows.ids) if tokens == 1000 else held <= len(rows.ids)


def test_rows_of_a_large_tree_attend_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(attn_implementation=NAME), branching_rows()
    (micro,) = pack_tree(rows, 1000)
    whole = token_logprobs(model, micro)
    number = len(attention.blocks_of(micro.lengths, micro.shared, model.device).blocks)
    monkeypatch.setattr(attention, "MASKED_KEYS", 20)
    assert len(attention.blocks_of(micro.lengths, micro.shared, model.device).blocks) > number
    torch.testing.assert_close(token_logprobs(model, micro), whole, atol=5e-6, rtol=0)


def kept_bytes(model: Any, micro: Packed) -> int:
    """What the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = token_logprobs(model, micro)
    assert values.requires_grad
    return sum(kept.values())


def test_a_tree_keeps_as_much_memory_as_one_row_of_its_tokens() -> None:
    """Whatever it stands for: here 40 rows of 300 tokens in 495 tokens."""
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 50, 295)
    ids = [np.concatenate([stem, [row], rng.integers(0, 50, 4)]) for row in range(40)]
    (tree,) = pack_tree(Rows.from_lists(ids, [[0.0] * 296 + [1.0] * 4] * 40), 1000)
    flat = Rows.from_lists([tree.input_ids[0]], [[0.0] * 335 + [1.0] * 160])
    assert (tree.num_tokens, len(tree.weights)) == (495, 12000)
    model = tiny_model(attn_implementation=NAME)
    assert kept_bytes(model, tree) < 1.1 * kept_bytes(model, pack(flat, 1000)[0])


def test_a_model_with_another_attention_is_refused() -> None:
    (micro,) = pack_tree(Rows.from_lists([[1, 2, 3], [1, 2, 4]], [[0, 0, 1], [0, 0, 1]]), 100)
    with pytest.raises(InputError, match=r"rows share tokens: expected .* agl_blocks .*, got sdpa"):
        token_logprobs(tiny_model(), micro)


# --- whole steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def step(
    folder: Path, rows: str, algorithm: dict[str, Any], spans: Any, batch: TrainBatch, **more: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradients of the step's updates before clipping, one after the other; and its metrics."""
    config = LearnerConfig(**{"max_grad_norm": 1e9, "lr": 1e-2, **more})
    trajectory = TrajectoryConfig.model_validate({"rows": rows, "overlong": "truncate"})
    learner = Learner(AlgorithmConfig.model_validate(algorithm), config, folder)
    kept: list[torch.Tensor] = []
    update = learner.optimizer.step

    def keep() -> None:
        kept.extend(p.grad.flatten().clone() for p in learner.model.parameters())
        if config.minibatches > 1:
            update()

    learner.optimizer.step = keep  # type: ignore[method-assign]
    (payload,) = lay_out(
        spans, batch, learner.algorithm, config, world_size=1, seed=0, trajectory=trajectory
    )
    metrics = learner.train(payload)
    return torch.cat(kept), metrics


def assert_same(
    linear: tuple[torch.Tensor, dict[str, float]], tree: tuple[torch.Tensor, dict[str, float]]
) -> None:
    """Gradients are equal to 1e-5 of their norm, and all that is measured but for the tokens run forward and for time."""
    (want, before), (got, after) = linear, tree
    assert want.norm() > 1e-3
    assert (got - want).norm() <= 1e-5 * want.norm()
    others = {"tokens_forward", "tokens_shared", "tokens_repeated"}
    for name in before.keys() - others:
        if not name.startswith("seconds"):
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-5), name
    whole = before["tokens_forward"]
    assert before["tokens_shared"] == 0
    assert after["tokens_forward"] + after["tokens_shared"] == whole
    assert before["tokens_repeated"] - after["tokens_repeated"] == after["tokens_shared"]


ALGORITHMS: tuple[dict[str, Any], ...] = (
    {},
    {"name": "gspo"},
    {"aggregation": "seq-mean-token-mean", "unit": "row", "correction": "tis"},
    {"name": "gmpo", "correction": "seq-tis"},
    {"name": "cispo", "correction": "geometric-mask", "geometric_band": 0.3},
    {"name": "ppo"},
    {"name": "clip_cov", "cov_share": 0.1, "entropy_coefficient": 0.1, "kl": {"coefficient": 0.5}},
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_gradient_of_a_step_is_that_of_the_rows(
    folder: Path, algorithm: dict[str, Any], minibatches: int
) -> None:
    batch = branching_batch(1)
    linear = step(folder, "merge-prefix", algorithm, *batch, minibatches=minibatches)
    tree = step(folder, "tree", algorithm, *batch, minibatches=minibatches)
    assert_same(linear, tree)
    assert tree[1]["tokens_forward"] < linear[1]["tokens_forward"] / 1.5
    assert tree[1]["tokens_repeated"] == 0


def test_so_is_it_with_a_reference_in_the_reward_and_layers_computed_again(
    folder: Path, tmp_path: Path
) -> None:
    other = str(model_folder(tmp_path / "other", seed=1))
    algorithm = {"kl": {"coefficient": 0.05, "where": "reward", "reference": other}}
    batch = branching_batch(5)
    linear = step(folder, "merge-prefix", algorithm, *batch)
    tree = step(folder, "tree", algorithm, *batch, gradient_checkpointing=True)
    assert tree[1]["kl_reference"] > 0
    assert_same(linear, tree)


def test_a_mixture_of_experts_sends_each_token_once(tmp_path: Path) -> None:
    mixture, batch = model_folder(tmp_path / "moe", experts=True), branching_batch(6)
    assert_same(step(mixture, "merge-prefix", {}, *batch), step(mixture, "tree", {}, *batch))


@pytest.mark.parametrize("tokens", [1, 30, 70])
def test_a_tree_that_is_cut_gives_the_same_step(folder: Path, tokens: int) -> None:
    batch = branching_batch(2)
    linear = step(folder, "merge-prefix", {"name": "gspo"}, *batch)
    tree = step(folder, "tree", {"name": "gspo"}, *batch, tokens_per_microbatch=tokens)
    assert_same(linear, tree)
    assert tree[1]["tokens_repeated"] > 0


@pytest.mark.parametrize("most", [12, 25])
def test_rows_that_are_too_long_are_those_of_merge_prefix(folder: Path, most: int) -> None:
    batch = branching_batch(3)
    linear = step(folder, "merge-prefix", {}, *batch, max_row_tokens=most)
    tree = step(folder, "tree", {}, *batch, max_row_tokens=most)
    assert_same(linear, tree)
    assert tree[1]["rows_truncated"] > 0 < tree[1]["tokens_dropped_overlong"]


def test_per_call_is_the_same_with_more_tokens(folder: Path) -> None:
    batch = random_batch(4)
    tree = step(folder, "tree", {}, *batch)
    per_call = step(folder, "per-call", {}, *batch)
    assert (tree[0] - per_call[0]).norm() <= 1e-5 * per_call[0].norm()
    assert tree[1]["tokens_forward"] < per_call[1]["tokens_forward"]


def test_two_calls_that_say_the_same_both_count(folder: Path) -> None:
    """Same ids, other log-probabilities, temperature and advantage: the tree has one path of six tokens, and two rows on it."""
    said = [7, 8, 9]
    cool = {"request": {"sampling": {"temperature": 0.5}}}
    spans = table(
        [
            call("a", [1, 2, 3], said, attempt=("ro-1", "at-1"), logprobs=[-3.9, -3.8, -4.0]),
            call(
                "a",
                [1, 2, 3],
                said,
                attempt=("ro-2", "at-2"),
                logprobs=[-3.5, -4.2, -3.7],
                attributes=cool,
            ),
        ]
    )
    members = tuple(
        Member(rollout_id=f"ro-{i}", attempt_id=f"at-{i}", reward=reward)
        for i, reward in ((1, 1.0), (2, 0.0), (3, -1.5))
    )
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    linear, tree = (step(folder, rows, {}, spans, batch) for rows in ("merge-prefix", "tree"))
    assert_same(linear, tree)
    assert (linear[1]["tokens_forward"], tree[1]["tokens_forward"]) == (12, 6)
    assert tree[1]["tokens_trained"] == 6
