"""Two ranks are one: FSDP2 over Gloo in real processes against a single process; checkpoints; deaths."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import learner_ranks
import pytest
import torch
from learner_data import model_folder
from safetensors.torch import load_file

from agl_ray.config.models import LearnerConfig
from agl_ray.learner.step import Learner
from agl_ray.types import InputError

pytestmark = pytest.mark.slow

SAME = (
    "loss",
    "grad_norm",
    "entropy",
    "engine_kl",
    "max_logprob_diff",
    "ratio_mean",
    "tokens_trained",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def assert_close(one: dict[str, Any], other: dict[str, Any], atol: float = 1e-5) -> None:
    for (name, left), (same_name, right) in zip(one["state"], other["state"], strict=True):
        assert name == same_name
        torch.testing.assert_close(
            left, right, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    for left, right in zip(one["metrics"], other["metrics"], strict=True):
        for name in SAME:
            assert left[name] == pytest.approx(right[name], abs=1e-5), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"minibatches": 3, "weight_decay": 0.1},
        {"tokens_per_microbatch": 1},
        {"optimizer": "muon", "weight_decay": 0.1},
    ],
)
def test_two_ranks_equal_one(folder: Path, settings: dict[str, Any]) -> None:
    (one,) = learner_ranks.run(1, "train", folder, (1, 6), settings)
    first, second = learner_ranks.run(2, "train", folder, (1, 6), settings)
    assert_close(one, first)
    assert second["state"] == []
    for left, right in zip(first["metrics"], second["metrics"], strict=True):
        assert {n: v for n, v in left.items() if "seconds" not in n} == {
            n: v for n, v in right.items() if "seconds" not in n
        }


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_two_ranks_beside_a_reference_equal_one(folder: Path, tmp_path: Path, where: str) -> None:
    """The reference is a checkpoint of two ranks, read by one too."""
    reference = tmp_path / "step-2"
    learner_ranks.run(2, "train", folder, (1, 3), {"lr": 1e-2}, None, reference)
    kl = {"coefficient": 0.3, "where": where, "reference": str(reference)}
    settings = {"minibatches": 2, "algorithm": {"kl": kl}}
    (one,) = learner_ranks.run(1, "train", folder, (1, 4), settings)
    first, second = learner_ranks.run(2, "train", folder, (1, 4), settings)
    assert_close(one, first)
    for left, right, same in zip(one["metrics"], first["metrics"], second["metrics"], strict=True):
        assert left["kl_reference"] > 0.01
        for name in ("kl_reference", "kl_old", "advantage_std"):
            assert left[name] == pytest.approx(right[name], abs=1e-5), name
            assert right[name] == same[name]


def test_two_ranks_choose_the_tokens_that_one_would(folder: Path) -> None:
    algorithm = {"name": "clip_cov", "cov_share": 0.1, "cov_low": 0.1}
    settings = {"minibatches": 2, "algorithm": algorithm}
    (one,) = learner_ranks.run(1, "train", folder, (1, 4), settings)
    first, _ = learner_ranks.run(2, "train", folder, (1, 4), settings)
    assert_close(one, first)
    for left, right in zip(one["metrics"], first["metrics"], strict=True):
        assert left["cov_fraction"] > 0.05
        assert left["cov_fraction"] == pytest.approx(right["cov_fraction"])


def test_two_ranks_with_a_critic_equal_one_and_change_places(folder: Path, tmp_path: Path) -> None:
    """Three steps of PPO by one rank, by two, and by two that one goes on from."""
    algorithm = {"name": "ppo", "gae_lambda": 0.9, "kl": {"coefficient": 0.1, "where": "reward"}}
    critic = {"epochs": 2, "lr": 1e-2}
    settings = {"minibatches": 2, "lr": 1e-3, "algorithm": algorithm, "critic": critic}
    path = tmp_path / "step-2"
    (one,) = learner_ranks.run(1, "train", folder, (1, 4), settings)
    first, second = learner_ranks.run(2, "train", folder, (1, 3), settings, None, path)
    (rest,) = learner_ranks.run(1, "train", folder, (3, 4), settings, path)
    both = {**rest, "metrics": first["metrics"] + rest["metrics"]}
    assert second["metrics"][1]["value_loss"] == first["metrics"][1]["value_loss"]
    assert_close(one, both, atol=5e-5)
    assert_close({**one, "state": one["critic"]}, {**both, "state": both["critic"]}, atol=5e-4)
    for left, right in zip(one["metrics"], both["metrics"], strict=True):
        for name in (
            "value_loss",
            "value_mean",
            "explained_variance",
            "critic_grad_norm",
            "kl_penalty",
        ):
            assert left[name] == pytest.approx(right[name], abs=1e-4), name


def test_two_ranks_with_tied_embeddings(tmp_path: Path) -> None:
    tied = model_folder(tmp_path / "tied", tied=True)
    path = tmp_path / "step-2"
    (one,) = learner_ranks.run(1, "train", tied, (1, 3), {})
    first, _ = learner_ranks.run(2, "train", tied, (1, 3), {}, None, path)
    assert_close(one, first)
    (loaded,) = learner_ranks.run(1, "train", tied, (3, 4), {}, path)
    for (name, left), (_, right) in zip(first["state"], loaded["loaded"], strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("settings", [{}, {"minibatches": 2, "tokens_per_microbatch": 1000}])
def test_a_tree_on_two_ranks_equals_its_rows_on_one(folder: Path, settings: dict[str, Any]) -> None:
    (rows,) = learner_ranks.run(1, "branches", folder, "merge-prefix", settings)
    tree, second = learner_ranks.run(2, "branches", folder, "tree", settings)
    assert_close(rows, tree)
    for before, after in zip(rows["metrics"], tree["metrics"], strict=True):
        assert after["tokens_forward"] + after["tokens_shared"] == before["tokens_forward"]
        assert after["tokens_shared"] > 0
    assert second["metrics"][1]["loss"] == tree["metrics"][1]["loss"]


def test_two_ranks_equal_one_with_a_tied_head_in_chunks_and_layers_recomputed(
    tmp_path: Path,
) -> None:
    folder = model_folder(tmp_path, tied=True)
    settings = {"algorithm": {"entropy_coefficient": 0.01}}
    (one,) = learner_ranks.run(1, "train", folder, (1, 4), settings)
    settings = {**settings, "gradient_checkpointing": True, "chunk": 7 * 50}
    first, _ = learner_ranks.run(2, "train", folder, (1, 4), settings)
    assert_close(one, first)
    entropies = [side["metrics"][-1]["entropy_full"] for side in (one, first)]
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_bfloat16_ranks_stay_close_to_float32(folder: Path, world_size: int) -> None:
    (exact,) = learner_ranks.run(1, "train", folder, (1, 2), {})
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True, "chunk": 7 * 50}
    coarse = learner_ranks.run(world_size, "train", folder, (1, 2), settings)[0]
    want, got = exact["metrics"][0], coarse["metrics"][0]
    assert got["loss"] != want["loss"]
    assert got["loss"] == pytest.approx(want["loss"], abs=0.05)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.1)
    assert all(tensor.dtype == torch.float32 for _, tensor in coarse["state"])


LORA = {"lora": {"rank": 3}, "lr": 5e-3}  # a rank that two ranks cannot halve


def test_the_gradient_of_adapters_is_that_of_one_rank(folder: Path) -> None:
    settings = {**LORA, "algorithm": {"kl": {"coefficient": 0.1}}}  # from the base: adapters off
    (one,) = learner_ranks.run(1, "gradient", folder, settings)
    settings |= {"gradient_checkpointing": True}
    first, second = learner_ranks.run(2, "gradient", folder, settings)
    assert len(one) == 28
    assert all("lora_" in name for name in one)
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(first[name], gradient, atol=1e-5, rtol=0)
        assert torch.equal(first[name], second[name])


def test_adapters_over_two_ranks_go_on_over_one(tmp_path: Path) -> None:
    tied = model_folder(tmp_path / "tied", tied=True)
    path, target = tmp_path / "step-3", tmp_path / "export"
    (whole,) = learner_ranks.run(1, "train", tied, (1, 6), LORA)
    both, _ = learner_ranks.run(2, "train", tied, (1, 4), LORA, None, path)
    (rest,) = learner_ranks.run(1, "train", tied, (4, 6), LORA, path)
    assert_close({"state": [], "metrics": whole["metrics"][:3]}, {**both, "state": []})
    assert_close({**whole, "metrics": whole["metrics"][3:]}, rest)
    for (name, left), (_, right) in zip(both["state"], rest["loaded"], strict=True):
        assert torch.equal(left, right), name
    exported = learner_ranks.run(2, "export", tied, target, LORA)[0]["state"]
    again = dict(Learner(learner_ranks.ALGORITHM, LearnerConfig(), target).full_state())
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported)
    assert len(load_file(target / "adapter" / "adapter_model.safetensors")) == 28


def test_adapters_of_roles_over_two_ranks_go_on_over_one(folder: Path, tmp_path: Path) -> None:
    """Also where a rank has no row of a role, and where a role had none before the checkpoint."""
    (whole,) = learner_ranks.run(1, "roles", folder, (1, 5))
    path = tmp_path / "step-1"
    first, _ = learner_ranks.run(2, "roles", folder, (1, 2), None, path)
    assert [name for name, tensor in first["state"] if not tensor.any()] == [
        name for name, _ in first["state"] if name.startswith("writer/") and "lora_B" in name
    ]
    both, _ = learner_ranks.run(2, "roles", folder, (2, 5), path)
    (rest,) = learner_ranks.run(1, "roles", folder, (2, 5), path)
    of_writer = "tokens_trained.writer"
    assert [of_writer in metrics for metrics in whole["metrics"]] == [False, True, True, True]
    want = {**whole, "metrics": whole["metrics"][1:]}
    assert_close(want, both)
    assert_close(want, rest)


def test_a_rank_without_rows_keeps_step(folder: Path) -> None:
    (one,) = learner_ranks.run(1, "one_row", folder)
    first, _ = learner_ranks.run(2, "one_row", folder)
    assert one["metrics"][0]["rows"] == 1
    assert_close(one, first)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_gives_the_same_losses(folder: Path, tmp_path: Path, world_size: int) -> None:
    settings = {"minibatches": 2, "weight_decay": 0.01}
    whole = learner_ranks.run(world_size, "train", folder, (1, 6), settings)[0]
    path = tmp_path / "step-2"
    learner_ranks.run(world_size, "train", folder, (1, 3), settings, None, path)
    rest = learner_ranks.run(world_size, "train", folder, (3, 6), settings, path)[0]
    losses = [[m["loss"], m["grad_norm"]] for m in whole["metrics"]]
    assert [[m["loss"], m["grad_norm"]] for m in rest["metrics"]] == losses[2:]
    assert rest["version"] == 5
    for (_, left), (_, right) in zip(whole["state"], rest["state"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("before", "after", "settings"), [(2, 1, {}), (1, 2, {}), (2, 1, {"optimizer": "muon"})]
)
def test_a_checkpoint_is_read_by_another_number_of_ranks(
    folder: Path, tmp_path: Path, before: int, after: int, settings: dict[str, Any]
) -> None:
    path = tmp_path / "step-2"
    saved = learner_ranks.run(before, "train", folder, (1, 3), settings, None, path)[0]
    loaded = learner_ranks.run(after, "train", folder, (3, 5), settings, path)[0]
    for (name, left), (_, right) in zip(saved["state"], loaded["loaded"], strict=True):
        assert torch.equal(left, right), name
    on = learner_ranks.run(before, "train", folder, (3, 5), settings, path)[0]
    assert_close(on, loaded)


def test_saving_before_the_first_step_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (plain,) = learner_ranks.run(1, "train", folder, (1, 3), {})
    path = tmp_path / "step-0"
    learner_ranks.run(1, "train", folder, (1, 1), {}, None, path)
    (resumed,) = learner_ranks.run(1, "train", folder, (1, 3), {}, path)
    assert_close(plain, resumed, atol=0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_falls_silent_makes_the_other_fail(
    folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    first, second = learner_ranks.start(2, "die", folder, how, out=tmp_path)
    first.join(learner_ranks.SECONDS)
    second.kill()
    second.join(learner_ranks.SECONDS)
    assert (first.exitcode, second.exitcode) == (0, -9)
    said = torch.load(tmp_path / "0.pt")
    assert said.startswith("failed: ")
    assert "gloo" in said  # by which actors/learner.py tells it from other errors


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_save_never_looks_complete(folder: Path, tmp_path: Path, world_size: int) -> None:
    path = tmp_path / "step-1"
    processes = learner_ranks.start(world_size, "die_in_save", folder, path, out=tmp_path)
    for process in processes:
        process.join(learner_ranks.SECONDS)
    assert processes[0].exitcode == -9
    assert not path.exists()
    assert (tmp_path / ".step-1.partial").exists()  # it really was in the middle
    learner = Learner(learner_ranks.ALGORITHM, LearnerConfig(), folder)
    for candidate in (path, tmp_path / ".step-1.partial"):
        with pytest.raises(InputError, match="not a checkpoint, or its saving was interrupted"):
            learner.load(candidate)
    learner.save(path)
    learner.load(path)
    assert not (tmp_path / ".step-1.partial").exists()


def test_two_ranks_export_what_they_hold(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    state = learner_ranks.run(2, "export", folder, target)[0]["state"]
    again = Learner(learner_ranks.ALGORITHM, LearnerConfig(), target).full_state()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(state, again, strict=True))


def test_offloaded_weights_learn_what_others_do(folder: Path) -> None:
    """On CPU ranks, where FSDP2 copies nothing; micro-batches added up, clipped by the global norm, and gathered."""
    plain, offloaded = (
        learner_ranks.run(2, "offload", folder, offload)[0] for offload in (False, True)
    )
    for (name, left), (_, right) in zip(plain, offloaded, strict=True):
        assert torch.equal(left, right), name
