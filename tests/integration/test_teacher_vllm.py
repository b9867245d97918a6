"""On-policy distillation from a real vLLM server: who may learn from it, advantages of 0 for its equal, and a student that comes near it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation import own_rollouts
from learner_data import model_folder

from actors.engine_vllm import engine_environment
from actors.learner import LearnerRank
from agl_ray.config.models import AlgorithmConfig, EngineConfig, LearnerConfig, RunConfig
from agl_ray.config.teacher import TeacherConfig
from agl_ray.learner import teacher
from agl_ray.learner.packing import token_logprobs
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.step import Learner
from agl_ray.learner.teacher import Teacher
from agl_ray.types import ConfigError
from tests.integration import tiny_model

pytestmark = pytest.mark.slow

ROOM = 64  # tokens of a row that the server takes, its answer's included


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("vllm") / "teacher")


@pytest.fixture(scope="module")
def config(folder: Path) -> Iterator[TeacherConfig]:
    """`vllm serve` of the folder in a process group of its own; `Teacher.check` waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
         *("--served-model-name", "large", "--host", "127.0.0.1", "--port", str(port)),
         *("--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log", "--max-model-len", str(ROOM)),
         *("--kv-cache-memory-bytes", str(64 * 2**20))],
        env={**os.environ, **engine_environment(EngineConfig())},
        start_new_session=True,
    )  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setattr(teacher, "CHECK_SECONDS", 300.0)  # a busy machine takes minutes to start vLLM
    try:
        yield TeacherConfig(base_url=f"http://127.0.0.1:{port}/v1", model="large")
    finally:
        patch.undo()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def learner(folder: Path, config: TeacherConfig) -> Learner:
    made = AlgorithmConfig.model_validate({"name": "opd", "teacher": config.model_dump()})
    return Learner(made, LearnerConfig(lr=5e-3, max_row_tokens=32), folder)


def rows_of(student: Learner, config: TeacherConfig, step: int) -> Payload:
    spans, batch = own_rollouts(
        student, step, vocabulary=tiny_model.VOCAB, prompts=1, each=80, tokens=2
    )
    asked = Teacher(config, student.config.max_row_tokens)
    (payload,) = lay_out(
        spans,
        batch,
        student.algorithm,
        student.config,
        world_size=1,
        seed=0,
        score=lambda rows: asyncio.run(asked.score(rows)),
    )
    return payload


def test_its_equal_has_advantages_of_zero(config: TeacherConfig, folder: Path) -> None:
    words = asyncio.run(Teacher(config, ROOM - 1).check(folder))
    assert words.endswith(f"rows of up to {ROOM - 1} tokens")
    student = learner(folder, config)
    payload = rows_of(student, config, 1)
    assert payload.stats["rows_scored"] == payload.stats["rows"] == 80
    for micro in payload.updates[0].micros:
        with torch.no_grad():
            own = token_logprobs(student.model, micro).numpy()
        counted = micro.weights > 0
        assert counted.sum() > 100
        assert abs(micro.columns["teacher_logprobs"] - own)[counted].max() < 1e-4
    metrics = student.train(payload)
    assert abs(metrics["kl_teacher"]) < 1e-5
    assert metrics["rows_dropped_unscored"] == 0


def test_who_has_another_tokenizer_or_longer_rows_is_refused(
    config: TeacherConfig, folder: Path, tmp_path: Path
) -> None:
    other = model_folder(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"expected the student's tokenizer, but tokens 0 to 49"):
        asyncio.run(Teacher(config, 32).check(other))
    with pytest.raises(ConfigError, match=rf"takes {ROOM} tokens.*start it with .* {ROOM + 1}"):
        asyncio.run(Teacher(config, ROOM).check(folder))


def test_a_learner_rank_looks_at_its_teacher_before_anything_else(
    config: TeacherConfig, folder: Path
) -> None:
    def rank(**teacher: Any) -> LearnerRank:
        made = {"name": "opd", "teacher": {**config.model_dump(), **teacher}}
        given = {
            "model": {"path": str(folder)},
            "algorithm": made,
            "learner": {"max_row_tokens": 32},
        }
        run = RunConfig.model_validate(given).model_dump(mode="json")
        return LearnerRank(0, 1, run, str(folder), 0)

    assert rank().setup("", 0)["parameters"] > 0
    with pytest.raises(ConfigError, match=r"teacher\.model: expected one of \['large'\]"):
        rank(model="small").setup("", 0)


def test_a_student_comes_near_it(config: TeacherConfig, tmp_path: Path) -> None:
    student = learner(tiny_model.make(tmp_path / "student", seed=1), config)
    seen = []
    for step in range(1, 10):
        metrics = student.train(rows_of(student, config, step))
        assert metrics["rows_scored"] == 80
        seen.append(metrics["kl_teacher"])
    assert seen[0] > 1.0
    assert np.mean(seen[-3:]) < 0.7 * np.mean(seen[:2]), seen
