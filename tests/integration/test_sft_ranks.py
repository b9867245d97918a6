"""Fine-tuning on two FSDP ranks, in processes of their own: the same weights as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agl_ray.config.logging import LoggingConfig
from agl_ray.config.lora import LoraConfig
from agl_ray.learner.sft import SFTConfig
from agl_ray.learner.sft_run import SFTJob, run
from agl_ray.trajectory.ragged import Rows
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow


def made_rows(seed: int, number: int) -> Rows:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, rng.integers(4, 25)) for _ in range(number)]
    return Rows.from_lists(ids, [np.arange(len(row)) % 3 > 0 for row in ids])


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_two_ranks_make_the_weights_of_one(tmp_path: Path, lora: LoraConfig | None) -> None:
    from safetensors.torch import load_file

    job = SFTJob(
        model=make(tmp_path / "model"),
        output=tmp_path / "one",
        rows=made_rows(0, 7),  # batches of odd sizes, of several micro-batches
        held_out=made_rows(1, 1),  # fewer rows than ranks
        config=SFTConfig(steps=4, lr=1e-3, batch_rows=5, warmup_steps=1, tokens_per_microbatch=30, packed=True),
        facts={},
        lora=lora,
        checkpoint_every=2,
        writers=LoggingConfig(writers=[]),
    )  # fmt: skip
    one = run(job)
    two = run(replace(job, output=tmp_path / "two", ranks=2))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["parameters_trained"] == one["parameters_trained"]
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], abs=1e-5)
    expected, found = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two")
    )
    assert expected.keys() == found.keys()
    assert max((expected[name] - found[name]).abs().max().item() for name in expected) < 1e-5
