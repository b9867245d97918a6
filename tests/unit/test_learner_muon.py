"""Muon: torch's own update where the matrix is whole, which weights it moves, its checkpoint; what is refused.

Two ranks against one are in tests/integration/test_learner_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder
from test_learner_lora import train

from agl_ray.config.load import validate
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner import muon
from agl_ray.learner.model import load_model
from agl_ray.learner.step import Learner
from agl_ray.types import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), biases=True)


def make(folder: Path, **settings: Any) -> Learner:
    config = LearnerConfig(optimizer="muon", **{"lr": 1e-2, **settings})
    return Learner(AlgorithmConfig(), config, folder)


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_inside_the_layers_only(tmp_path: Path, tied: bool) -> None:
    model = load_model(model_folder(tmp_path, tied=tied, biases=True))
    chosen = muon.matrices(model)
    names = {name for name, parameter in model.named_parameters() if parameter in chosen}
    assert len(names) == 2 * 7
    assert all(".layers." in name and name.endswith("_proj.weight") for name in names)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_an_orthogonalized_matrix_has_singular_values_near_1(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    group = torch.optim.Muon([torch.zeros(2, 2)]).param_groups[0]
    matrix = torch.randn(shape)
    made = muon.orthogonalized(matrix, group, torch.float32)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    of_made = (left.T @ made @ right.T).diagonal()  # in the singular vectors of the matrix
    assert ((of_made > 0.3) & (of_made < 1.4))[values > 0.05 * values.max()].all()
    assert made.shape == shape


def test_an_update_is_torchs(folder: Path) -> None:
    """To the precision of torch's bfloat16, in which its five steps are."""
    torch.manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2}
    one = muon.ShardedMuon([ours], **settings)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved = (theirs - 1.0).abs().mean()
    assert (ours - theirs).abs().mean() < 0.02 * moved
    torch.testing.assert_close(
        one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"]
    )


def test_one_update_beside_that_of_adamw(folder: Path) -> None:
    """The same gradients: what is no matrix of a layer moves as with AdamW alone, the matrices as far, but another way."""
    learner, plain = make(folder), Learner(AlgorithmConfig(), LearnerConfig(lr=1e-2), folder)
    before = {name: tensor.clone() for name, tensor in learner.full_state()}
    assert train(learner, 1, 1)[0]["grad_norm"] == train(plain, 1, 1)[0]["grad_norm"] > 0
    after, other = dict(learner.full_state()), dict(plain.full_state())
    assert not [name for name in before if torch.equal(before[name], after[name])]
    differ = {name for name in before if not torch.equal(after[name], other[name])}
    assert differ == {name for name in before if name.endswith("_proj.weight")}
    for name in differ:
        ours, theirs = (
            (state[name] - before[name]).square().mean().sqrt() for state in (after, other)
        )
        assert (
            0.05 < ours / theirs < 1.0
        )  # AdamW's first update is its largest, lr in every element


def test_a_resumed_run_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    whole = make(folder, weight_decay=0.1, warmup_steps=3)
    rows = train(whole, 1, 2)
    whole.save(tmp_path / "step-2")
    rows += train(whole, 3, 4)
    resumed = make(folder, weight_decay=0.1, warmup_steps=3)
    resumed.load(tmp_path / "step-2")
    again = train(resumed, 3, 4)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[2:]]
    for (_, left), (_, right) in zip(whole.full_state(), resumed.full_state(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": "muon", "lora": {}}, r"learner\.optimizer muon .* learner\.lora"),
        ({"optimizer": "muon", "cpu_offload": True, "num_gpus": 1.0}, r"muon .* learner\.cpu_offload"),
        ({"optimizer": "sgd"}, r"learner\.optimizer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, "learner": given})
