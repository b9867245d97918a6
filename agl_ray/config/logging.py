"""The section `logging`: where the metrics of a run go besides the screen and metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from agl_ray.config.section import Section
from agl_ray.config.store_address import masked

WriterName = Literal["tensorboard", "wandb", "mlflow"]
Name = Annotated[str, Field(min_length=1)]


class WandbConfig(Section):
    """Weights & Biases; needs the extra `wandb`."""

    project: Name = "agl-ray"
    """Project in which the run appears, under the run folder's name."""
    entity: Name | None = None
    """User or team; None = the one of the API key."""
    group: Name | None = None
    """Name under which W&B shows several runs together, such as the seeds of one experiment."""
    mode: Literal["online", "offline"] = "online"
    """online needs WANDB_API_KEY in the driver's environment (or `wandb login` on its machine); offline writes into RUN_FOLDER/wandb, for
    `wandb sync` later (`--append` for the second sitting of a resumed run)."""


class MlflowConfig(Section):
    """MLflow tracking; needs the extra `mlflow`."""

    tracking_uri: Name | None = None
    """`http://host:port`, `sqlite:///path`, ... (MLflow 3 takes `file:///path` only with MLFLOW_ALLOW_FILE_STORE=true). None =
    MLFLOW_TRACKING_URI, else `sqlite:///RUNS_DIR/mlflow.db`."""
    experiment: Name = "agl-ray"
    """Experiment in which the run appears, under the run folder's name; made where it is not there."""

    @model_validator(mode="after")
    def _no_password(self) -> MlflowConfig:
        """It would stand in config.json."""
        if self.tracking_uri is not None and masked(self.tracking_uri) != self.tracking_uri:
            raise ValueError(
                f"logging.mlflow.tracking_uri: expected no password in it, got {masked(self.tracking_uri)}; give it in the driver's "
                "environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI as MLFLOW_TRACKING_URI"
            )
        return self


class LoggingConfig(Section):
    writers: list[WriterName] = ["tensorboard"]
    """Where metrics go too: tensorboard (RUN_FOLDER/tensorboard), wandb, mlflow. A writer that fails while the run goes on is told of once
    and counted (`writer_failures`); it makes up what it missed from metrics.jsonl as soon as it works again. [] = none."""
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @model_validator(mode="after")
    def _named_once_and_used(self) -> LoggingConfig:
        if len(set(self.writers)) < len(self.writers):
            raise ValueError(f"logging.writers: each at most once, got {self.writers}")
        for name in ("wandb", "mlflow"):
            section = getattr(self, name)
            if name not in self.writers and section != type(section)():
                raise ValueError(
                    f"logging.{name} acts only with {name} in logging.writers, and it is not in {self.writers}; "
                    "add it there or leave the section out"
                )
        return self
