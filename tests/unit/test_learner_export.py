"""Whole weights under checkpoint names, and the exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_data import model_folder, random_batch
from safetensors.torch import load_file

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner


@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"experts": True}])
def test_full_state_is_the_checkpoint_and_export_is_the_full_state(
    tmp_path: Path, kind: dict[str, bool]
) -> None:
    source = model_folder(tmp_path / "model", **kind)
    config = LearnerConfig(lr=1e-2)
    learner = Learner(AlgorithmConfig(), config, source)
    stored = load_file(source / "model.safetensors")
    state = dict(learner.full_state())
    assert sorted(state) == sorted(stored)
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    made = make_algorithm(AlgorithmConfig())
    spans, batch = random_batch(0)
    learner.train(lay_out(spans, batch, made, config, world_size=1, seed=0)[0])
    assert all(torch.equal(state[name], stored[name]) for name in stored)  # a copy, not a view
    trained = dict(learner.full_state())
    same = [name for name in stored if torch.equal(trained[name], stored[name])]
    assert all("expert" in name for name in same)  # an expert may have been asked for no token
    assert len(same) < len(stored) / 4
    target = tmp_path / "export"
    learner.export(target)
    again = dict(Learner(AlgorithmConfig(), config, target).full_state())
    assert list(again) == list(trained)
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_an_export_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    learner = Learner(AlgorithmConfig(), LearnerConfig(), model_folder(tmp_path / "model"))
    target = tmp_path / "out" / "export"
    target.mkdir(parents=True)
    (target / "old.txt").write_text("from before")
    learner.export(target)
    assert not (target / "old.txt").exists()
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["export"]
