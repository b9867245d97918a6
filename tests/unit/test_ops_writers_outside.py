"""The writers of the extras against the real packages, on files of this machine alone; left out where they are not installed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from agl_ray.config.logging import LoggingConfig, MlflowConfig, WandbConfig
from agl_ray.ops.writer_choice import make_writers
from agl_ray.ops.writers import MetricsBoard


def sittings(folder: Path, config: LoggingConfig) -> list[str]:
    """Two sittings of one run: steps 1 and 2, then 3 with another learning rate; what was told."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    for start, steps, lr in ((0, [1, 2], 0.1), (2, [3], 0.2)):
        writers = make_writers(config, folder, {"learner": {"lr": lr}, "seed": 7}, {})
        board = MetricsBoard(folder, writers, said.append)
        board.begin(start)
        for step in steps:
            board.write({"step": step, "loss": step / 2, "reward_tag.<a b>": 1.0})
            board.validated({"step": step, "reward": 0.25})
        board.close(True, 60)
    return said


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log after a header of 7 bytes; W&B has no reader of its own in Python."""
    data, place, whole = file.read_bytes(), 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_mlflow_holds_both_sittings_in_one_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'tracking.db'}"
    config = LoggingConfig(
        writers=["mlflow"], mlflow=MlflowConfig(tracking_uri=uri, experiment="tests")
    )
    assert sittings(tmp_path / "run-1", config) == []
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run-1"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learner.lr": "0.1", "seed": "7"}
    assert run.data.tags["resumed.learner.lr"] == "0.2"
    for name, values in (
        ("train/loss", [0.5, 1.0, 1.5]),
        ("val/reward", [0.25] * 3),
        ("rollout/reward_tag/_a b_", [1.0] * 3),
    ):
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == list(enumerate(values, 1))


def test_wandb_offline_holds_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    config = LoggingConfig(
        writers=["wandb"], wandb=WandbConfig(mode="offline", project="tests", group="g")
    )
    folder = tmp_path / "run-1"
    assert sittings(folder, config) == []
    assert wandb.run is None
    points: list[tuple[str, float]] = []
    runs = set()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        for data in records(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.display_name, record.run.run_group))
            if record.HasField("history"):
                found = {
                    "/".join(item.nested_key) or item.key: item.value_json
                    for item in record.history.item
                }
                if "train/loss" in found:
                    points.append((found["step"], float(found["train/loss"])))
    assert len(runs) == 1
    assert {run[1:] for run in runs} == {("run-1", "g")}
    assert points == [("1", 0.5), ("2", 1.0), ("3", 1.5)]
