"""MLflow tracking (extra `mlflow`): one MLflow run per run folder, gone on with when the run is resumed.

Made by `agl_ray.ops.writer_choice`; test alone, with mlflow installed: tests/unit/test_ops_writers_outside.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agl_ray.config.logging import MlflowConfig
from agl_ray.ops.writers import Place

URI = "MLFLOW_TRACKING_URI"
KEYS = (URI, "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
FILE = "mlflow.db"
BATCH = 100  # parameters that MLflow takes at once
LONGEST = 6000  # characters of a parameter's value
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]", re.ASCII)  # in the name of a metric or parameter


class MlflowWriter:
    """Points under their grouped names (characters that MLflow refuses become _); the configuration as parameters, where a resumed run
    changes one, the new value as the tag `resumed.KEY`."""

    name = "mlflow"

    def __init__(self, folder: Path, config: Mapping[str, Any], settings: MlflowConfig) -> None:
        self._folder, self._config, self._settings = folder, config, settings
        self._client: Any = None
        self._run = ""

    def open(self, place: Place) -> Place:
        from mlflow import MlflowClient

        uri = self._settings.tracking_uri or os.environ.get(URI)
        self._client = MlflowClient(uri or f"sqlite:///{self._folder.parent / FILE}")
        if place.run is None:
            created = self._client.create_run(self._experiment(), run_name=self._folder.name)
            place.run = created.info.run_id
        else:
            self._client.update_run(place.run, status="RUNNING")
        self._run = str(place.run)
        self._configure()
        return place

    def _experiment(self) -> str:
        name = self._settings.experiment
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _configure(self) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run).data.params
        wanted = {_named(key): str(value)[:LONGEST] for key, value in self._config.items()}
        fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(fresh), BATCH):
            self._client.log_batch(self._run, params=fresh[start : start + BATCH])
        for key, value in wanted.items():
            if known.get(key, value) != value:
                self._client.set_tag(self._run, f"resumed.{key}", value)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(_named(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=points)

    def close(self, ok: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if ok else "FAILED")


def _named(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name)
