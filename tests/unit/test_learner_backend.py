"""Which backend computes, by learner.backend; verl is imported by its own one only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from learner_data import model_folder

from agl_ray.config import RunConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.learner import checkpoint
from agl_ray.learner.backend import BACKENDS, Rank, open_backend
from agl_ray.learner.step import Learner
from agl_ray.types import InputError

ALONE = Rank(0, 1, "127.0.0.1", 0)


def test_the_configuration_names_the_backends() -> None:
    assert set(get_args(LearnerConfig.model_fields["backend"].annotation)) == set(BACKENDS)


def test_our_own_needs_no_group_of_one_rank(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    config = RunConfig.model_validate({"model": {"path": str(folder)}})
    made = open_backend(config, folder, ALONE, seed=0, base=tmp_path)
    assert isinstance(made, Learner)
    assert made.num_parameters == sum(p.numel() for p in made.model.parameters())


def test_our_own_does_not_read_checkpoints_of_verl(tmp_path: Path) -> None:
    learner = Learner(RunConfig.model_validate({"model": {"path": "m"}}).algorithm, LearnerConfig(), model_folder(tmp_path / "model"))  # fmt: skip
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / checkpoint.POSITION).write_text('{"backend": "verl"}')
    with pytest.raises(InputError, match=r"expected one of learner\.backend native, got verl"):
        learner.load(tmp_path / "step")


@pytest.mark.parametrize("module", ["backend", "verl_engine", "verl_platform", "verl_rows"])
def test_none_imports_verl_by_itself(module: str) -> None:
    code = f"import agl_ray.learner.{module}, sys; assert not [m for m in sys.modules if m.split('.')[0] == 'verl']"
    subprocess.run([sys.executable, "-c", code], check=True)
