"""Gradient checkpointing: a decoder layer keeps its input only, and what is inside is computed again in the backward pass.

About a third more time for a memory that grows with the layers' inputs instead of everything in them. transformers' own switch acts
in training mode only, which would also turn dropout on; in the learner the model stays in evaluation mode. Fine-tuning is in training mode, and
there a layer's dropout is drawn again alike. Called by learner/step.py, learner/critic.py and learner/sft_run.py, before FSDP wraps the same layers. Test it alone with tests/unit/test_learner_recompute.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from agl_ray.types.errors import InputError


def decoder_layers(model: Any) -> list[Any]:
    """The model's layers, in order: the modules that transformers says are not to be split; [] where it names none."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_layers(model: Any) -> None:
    """Make every layer of `model` recompute itself. InputError where the architecture names no layers."""
    layers = decoder_layers(model)
    if not layers:
        raise InputError(
            f"learner.gradient_checkpointing: expected layers in {type(model).__name__} (_no_split_modules), found none; leave it (or "
            "--gradient-checkpointing) out"
        )
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer, layer.forward)


def _recomputed(layer: Any, forward: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    # Random numbers are drawn inside in training mode only: dropout's.
    return checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=layer.training, **more
    )
