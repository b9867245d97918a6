"""The section `algorithm.teacher`: a model on a vLLM server whose log-probabilities of the student's own tokens are an advantage.

On-policy distillation (agl_ray/algorithms/opd.py). Off unless the section is given. Called by the learner's client of it
(agl_ray/learner/teacher.py). Test alone: tests/unit/test_config_teacher.py.
"""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from agl_ray.config.keys import endpoint_key
from agl_ray.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section


class TeacherConfig(Section):
    base_url: str
    """API of the vLLM server (`vllm serve`): POST BASE_URL/completions with token ids and `prompt_logprobs`; its tokenizer is asked beside it."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model there. It must have the tokenizer of the student: the run refuses to start where any token id means something else."""
    api_key_env: str | None = None
    """Environment variable, where the learner runs, that holds its key; None = it asks for none."""
    coefficient: PositiveFloat = 1.0
    """Weight of the teacher's advantage of a token, coefficient * (log teacher - log pi), beside that of the rewards (`algorithm.advantage`; none for the
    teacher alone)."""
    bound: PositiveFloat = 20.0
    """Largest |log teacher - log pi| of one token, in nats, that counts; beyond it the bound does (metric teacher_bounded_fraction)."""
    concurrency: Positive = 32
    """Rows that are with the teacher at once."""
    retries: NonNegative = 3
    """Further tries of a row after no answer within `request_seconds`, 408, 409, 425, 429 or a status above 499. A server that cannot be
    reached is tried until the deadline."""
    request_seconds: PositiveFloat = 60.0
    """Deadline of one answer."""
    deadline_seconds: PositiveFloat = 300.0
    """Deadline of all rows of a step. Rows without an answer by then are dropped and counted (rows_dropped_unscored)."""
    min_scored: Fraction = 0.5
    """Least share of a step's rows that the teacher must have scored; below it (and always with none) the run stops."""

    @property
    def root(self) -> str:
        """Root of the server, where vLLM has what is not OpenAI's."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def key(self) -> str | None:
        """Its key, out of this process's environment; ConfigError where it is named and not there."""
        field = "algorithm.teacher.api_key_env"
        return endpoint_key(field, self.api_key_env, self.base_url, "where the learner runs")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ValueError(
                f"algorithm.teacher.base_url: expected http://... or https://..., got {self.base_url!r}"
            )
        if self.request_seconds > self.deadline_seconds:
            raise ValueError(
                f"algorithm.teacher.request_seconds ({self.request_seconds:g}) is beyond deadline_seconds ({self.deadline_seconds:g}) of the whole step"
            )
        return self


def check_temperature(teacher: TeacherConfig | None, temperature: float) -> None:
    """ValueError where the student would be sampled from another distribution than the one that the teacher's is compared with."""
    if teacher is not None and temperature != 1.0:
        raise ValueError(
            f"rollout.temperature: expected 1 with algorithm.teacher, got {temperature:g}: a server gives a prompt's log-probabilities at "
            "temperature 1 only"
        )
