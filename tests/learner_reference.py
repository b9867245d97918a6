"""Reference runs of the learner: ten steps of a tiny model whose weights and batches come from NumPy, the same on every machine.

Their losses, gradient norms and entropies are committed in tests/reference/learner_curves.json; tests/unit/test_learner_reference_curves.py
compares. Where the numerics are meant to change, renew them, look at the difference in git, and say why in the commit:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/learner_reference.py --write
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner_data import model_folder, random_batch
from transformers import AutoModelForCausalLM

from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner

FILE = Path(__file__).parent / "reference" / "learner_curves.json"
STEPS = 10
CURVES = ("loss", "grad_norm", "entropy")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"lr": 1e-3}),
    "dapo, three updates": (
        {"name": "dapo"},
        {"lr": 3e-3, "minibatches": 3, "weight_decay": 0.1, "warmup_steps": 4},
    ),
    "gspo, two updates": ({"name": "gspo"}, {"lr": 1e-3, "minibatches": 2}),
    "dr_grpo, entropy bonus, layers recomputed": (
        {"name": "dr_grpo", "norm_tokens": 16, "entropy_coefficient": 0.01, "correction": "tis"},
        {"lr": 1e-3, "gradient_checkpointing": True},
    ),
}
"""Switches of the algorithm and of the learner, by case."""


def reference_model(folder: Path) -> Path:
    """As `model_folder`, with weights that no version of torch or transformers draws."""
    model_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = 0.1 * rng.normal(size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn + ("norm" in name)))
    model.save_pretrained(folder)
    return folder


def run(folder: Path, case: str, **more: Any) -> dict[str, list[float]]:
    """The curves of a case, a value per step. more: further settings of the learner."""
    switches, settings = CASES[case]
    algorithm = AlgorithmConfig.model_validate(switches)
    config = LearnerConfig(**{"tokens_per_microbatch": 60, **settings, **more})
    learner = Learner(algorithm, config, folder)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    for step in range(1, STEPS + 1):
        spans, batch = random_batch(11, step=step)
        payloads = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
        metrics = learner.train(payloads[0])
        for name in CURVES:
            curves[name].append(metrics[name])
    return curves


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"expected --write, got {sys.argv[1:]}")
    with tempfile.TemporaryDirectory() as name:
        folder = reference_model(Path(name))
        made = {case: run(folder, case) for case in CASES}
    FILE.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
