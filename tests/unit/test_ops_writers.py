"""Writers of metrics: grouped names, resumption without doubles, failures that are counted and made up, TensorBoard's own reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agl_ray.config.logging import LoggingConfig, MlflowConfig, WandbConfig
from agl_ray.ops.metric_groups import step_values, validation_values
from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics
from agl_ray.ops.writer_choice import check_writers, make_writers, writer_keys
from agl_ray.ops.writers import MetricsBoard, Place, hyperparameters
from agl_ray.types import ConfigError


class Memory:
    """A writer that keeps its points, and fails while `broken` holds a sentence."""

    name = "memory"

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.opened: list[Place] = []
        self.broken = ""
        self.closed: bool | None = None

    def open(self, place: Place) -> Place:
        self._check()
        self.opened.append(Place(place.run, dict(place.rows)))
        return Place(place.run or "run-1", place.rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._check()
        self.points.append((step, dict(values)))

    def close(self, ok: bool) -> None:
        self.closed = ok

    def _check(self) -> None:
        if self.broken:
            raise OSError(self.broken)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.points]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_names_are_grouped() -> None:
    row = {
        "step": 3, "reward": 0.5, "reward_tag.find.it": 1.0, "failures.timeout": 2, "loss": 0.1, "mine": 7,
        "advantage_std": 1.0, "engine_kl": 0.0, "max_token_age": 1, "token_age.0": 5, "tokens_dropped_failed": 0,
        "seconds_update": 2.0, "tokens_per_second": 9, "validation": 0.7, "note": "text", "nothing": None,
        "writer_failures.wandb": 1,
    }  # fmt: skip
    assert sorted(step_values(row)) == [
        "engine/engine_kl", "rollout/failures/timeout", "rollout/reward", "rollout/reward_tag/find.it",
        "staleness/max_token_age", "staleness/token_age/0", "time/seconds_update", "time/tokens_per_second",
        "time/writer_failures/wandb", "tokens/tokens_dropped_failed", "train/advantage_std", "train/loss", "train/mine",
    ]  # fmt: skip
    assert validation_values({"step": 0, "reward": 0.5, "failures.lost": 1}) == {
        "val/reward": 0.5,
        "val/failures/lost": 1.0,
    }


def test_a_board_writes_steps_and_validations_with_their_step(tmp_path: Path) -> None:
    writer = Memory()
    board = MetricsBoard(tmp_path, [writer])
    board.begin(0)
    board.validated({"step": 0, "reward": 0.25})
    board.write({"step": 1, "loss": 2.0, "validation": 0.5})
    board.validated({"step": 1, "reward": 0.5})
    board.close(True, 10)
    assert sorted(writer.points, key=str) == [
        (0, {"val/reward": 0.25}),
        (1, {"train/loss": 2.0}),
        (1, {"val/reward": 0.5}),
    ]
    assert writer.closed is True
    assert board.failures == {}


def test_a_resumed_run_goes_on_in_the_same_run_without_doubles(tmp_path: Path) -> None:
    first, second = Memory(), Memory()
    board = MetricsBoard(tmp_path, [first])
    board.begin(0)
    board.validated({"step": 0, "reward": 0.25})
    for step in (1, 2):
        board.write({"step": step})
    until(lambda: len(first.points) == 3)  # and then the process is gone: nobody closes it
    again = MetricsBoard(tmp_path, [second])
    again.begin(2)
    again.validated({"step": 0, "reward": 0.25})  # of a validation that was not committed
    again.write({"step": 3})
    again.close(True, 10)
    assert second.opened == [Place("run-1", {"metrics.jsonl": 2, VALIDATION_FILE: 1})]
    assert second.steps == [3]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(read_metrics(tmp_path, VALIDATION_FILE)) == 1


def test_a_failure_is_told_once_counted_and_made_up(tmp_path: Path) -> None:
    writer, said = Memory(), []
    writer.broken = "No space left on device"
    board = MetricsBoard(tmp_path, [writer], said.append)
    board.begin(0)
    for step in (1, 2):
        board.write({"step": step})
        failed = step
        until(lambda failed=failed: board.failures.get("memory", 0) >= failed)
    assert len(said) == 1
    assert "memory failed (OSError: No space left on device)" in said[0]
    writer.broken = ""
    board.write({"step": 3})
    board.close(True, 10)
    assert writer.steps == [1, 2, 3]
    assert "has all rows after" in said[1]


def test_rows_that_never_arrive_are_told_of_at_the_end(tmp_path: Path) -> None:
    writer, said = Memory(), []
    writer.broken = "no network"
    board = MetricsBoard(tmp_path, [writer], said.append)
    board.begin(0)
    for step in (1, 2, 3):
        board.write({"step": step})
    board.close(False, 10)
    assert "misses 3 rows" in said[-1]
    assert len(said) == 2
    assert len(read_metrics(tmp_path)) == 3


def test_a_writer_that_hangs_does_not_hold_the_run(tmp_path: Path) -> None:
    over = threading.Event()

    class Hanging(Memory):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            over.wait()

    said: list[str] = []
    board = MetricsBoard(tmp_path, [Hanging()], said.append)
    board.begin(0)
    board.write({"step": 1})
    board.close(True, 0.2)  # returns, or this test never ends
    assert "misses 1 rows" in said[0]
    over.set()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {
        tag: [(point.step, round(point.value, 4)) for point in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def tensorboard_board(folder: Path, said: list[str]) -> MetricsBoard:
    config = {"learner": {"lr": 0.1, "betas": [0.9, 0.95]}, "name": "run", "seed": None}
    return MetricsBoard(
        folder, make_writers(LoggingConfig(), folder, config, {}), lambda text: said.append(text)
    )


def test_tensorboard_reads_what_was_written_and_a_resumed_run_shows_no_point_twice(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    for sitting in ((0, [1, 2]), (1, [2, 3])):  # step 2 was not committed before the first ended
        board = tensorboard_board(tmp_path, said)
        board.begin(sitting[0])
        for step in sitting[1]:
            board.write({"step": step, "loss": step / 2, "reward": 0.5})
            board.validated({"step": step, "reward": 0.25})
        board.close(True, 30)
    assert said == []
    assert scalars(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "rollout/reward": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "val/reward": [(1, 0.25), (2, 0.25), (3, 0.25)],
    }


def test_tensorboard_keeps_the_configuration_as_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    board = tensorboard_board(tmp_path, [])
    board.begin(0)
    board.close(True, 30)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    kept = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(kept) == {"learner.lr", "learner.betas", "name"}
    assert kept["learner.lr"].number_value == 0.1
    assert kept["learner.betas"].string_value == "[0.9, 0.95]"


def test_tensorboard_on_a_full_disk_is_made_up(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "tensorboard").write_text("in the way")
    board = tensorboard_board(tmp_path, said)
    board.begin(0)
    board.write({"step": 1, "loss": 1.0})
    until(lambda: said)
    assert "tensorboard failed (FileExistsError" in said[0]
    (tmp_path / "tensorboard").unlink()
    board.write({"step": 2, "loss": 2.0})
    board.close(True, 30)
    assert scalars(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0)]}


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'agl-ray\[mlflow\]'"):
        check_writers(LoggingConfig(writers=["mlflow"]))
    check_writers(LoggingConfig(writers=[]))


def test_wandb_needs_a_key_unless_it_is_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online = LoggingConfig(writers=["wandb"])
    with pytest.raises(ConfigError, match=r"key for api\.wandb\.ai"):
        check_writers(online)
    check_writers(LoggingConfig(writers=["wandb"], wandb=WandbConfig(mode="offline")))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_writers(online)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_writers(online)
    assert writer_keys(online) == {"WANDB_API_KEY": "x" * 40}
    assert writer_keys(LoggingConfig()) == {}


def test_settings_of_a_writer_that_is_not_chosen_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logging\.mlflow acts only with mlflow"):
        LoggingConfig(mlflow=MlflowConfig(experiment="mine"))
    with pytest.raises(
        ValueError, match=r"no password in it, got http://me:\*\*\*@host:5000; give it"
    ):
        MlflowConfig(tracking_uri="http://me:secret@host:5000")
    with pytest.raises(ValueError, match="each at most once"):
        LoggingConfig(writers=["wandb", "wandb"])


def test_hyperparameters_are_flat() -> None:
    assert hyperparameters({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": True}) == {
        "a.b.c": 1,
        "e": "[1, 2]",
        "f": True,
    }
