"""Gradient checkpointing: the same gradients with less kept; dropout stays off; an architecture without layers is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learner_data import model_folder, random_batch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.packing import token_logprobs
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.recompute import decoder_layers, recompute_layers
from agl_ray.learner.step import Learner
from agl_ray.types import InputError

ALGORITHM = AlgorithmConfig()


def learner_and_payload(folder: Path, **settings: Any) -> tuple[Learner, Payload]:
    config = LearnerConfig(tokens_per_microbatch=60, **settings)
    spans, batch = random_batch(4)
    made = make_algorithm(ALGORITHM)
    payload = lay_out(spans, batch, made, config, world_size=1, seed=0)[0]
    return Learner(ALGORITHM, config, folder), payload


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"experts": True}])
def test_gradients_are_equal(tmp_path: Path, kind: dict[str, bool], dtype: str) -> None:
    folder = model_folder(tmp_path, **kind)
    seen = []
    for switched_on in (False, True):
        settings = {"dtype": dtype, "gradient_checkpointing": switched_on, "max_grad_norm": 1e9}
        learner, payload = learner_and_payload(folder, **settings)
        learner.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        metrics = learner.train(payload)
        grads = {name: p.grad for name, p in learner.model.named_parameters()}
        seen.append((metrics["loss"], grads))
    (plain_loss, plain), (loss, recomputed) = seen
    assert loss == plain_loss
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, atol=1e-7, rtol=0)


def test_gradients_of_adapters_are_equal_and_the_base_has_none(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    seen = []
    for switched_on in (False, True):
        settings = {"gradient_checkpointing": switched_on, "lora": {"rank": 4}}
        learner, payload = learner_and_payload(folder, **settings)
        learner.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        learner.train(payload)
        seen.append({name: p.grad for name, p in learner.model.named_parameters()})
    plain, recomputed = seen
    assert {name for name, grad in plain.items() if grad is not None} == {
        name for name, grad in recomputed.items() if grad is not None
    }
    for name, grad in plain.items():
        if grad is not None:
            torch.testing.assert_close(recomputed[name], grad, atol=1e-7, rtol=0)
    assert any(grad is not None and grad.abs().max() > 0 for grad in plain.values())


def kept_bytes(learner: Learner, payload: Payload) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, parameters apart."""
    own = {p.data_ptr() for p in learner.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _values = token_logprobs(learner.model, payload.updates[0].micros[0])
    return sum(kept.values())


def test_it_keeps_less_and_the_model_stays_in_evaluation_mode(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    plain = kept_bytes(*learner_and_payload(folder))
    learner, payload = learner_and_payload(folder, gradient_checkpointing=True)
    assert kept_bytes(learner, payload) < plain / 3
    assert not any(module.training for module in learner.model.modules())


def test_names_of_the_weights_stay_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    names = [
        [name for name, _ in learner_and_payload(folder, **settings)[0].full_state()]
        for settings in ({}, {"gradient_checkpointing": True})
    ]
    assert names[0] == names[1]


def test_a_model_without_layers_is_refused() -> None:
    model = SimpleNamespace(_no_split_modules=None, modules=list)
    assert decoder_layers(model) == []
    with pytest.raises(InputError, match=r"learner.gradient_checkpointing: expected layers in"):
        recompute_layers(model)


class Dropping(torch.nn.Module):
    """One layer of a model that fine-tuning would put into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(self.linear(hidden)))


class Layered(torch.nn.Sequential):
    _no_split_modules = ("Dropping",)


def test_dropout_of_a_model_in_training_mode_is_drawn_again_alike() -> None:
    torch.manual_seed(0)
    model, hidden = Layered(Dropping(), Dropping(), Dropping()), torch.randn(5, 8)
    seen = []
    for switched_on in (False, True):
        if switched_on:
            recompute_layers(model)
        torch.manual_seed(1)
        model.zero_grad()
        model(hidden).square().sum().backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert seen[0][0].abs().max() > 1e-3
    for plain, recomputed in zip(*seen, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)
