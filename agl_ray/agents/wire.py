"""What a runner, its fork server and the processes of agents say to one another.

A `Source` goes to the fork server at its start, a `Job` to each process; back come frames, `Rows` while the agent runs and one
`Outcome` at its end. A frame is its length in 4 bytes, then msgpack. Called by `processes`, `fork_server` and `fork_child`. Test alone:
tests/unit/test_agents_processes.py.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.agents.execute import Host
from agl_ray.agents.outcome import Outcome
from agl_ray.types import LLM, AttemptedRollout, PromptTemplate, Record

HEAD = 4  # bytes


class Source(Record, frozen=True):
    """Whom to run. pickled: (LitAgent or None, tuple of Hook). name: where the agent is None, its import string, resolved against `base`. instruments: as
    `tracing.instrument`."""

    pickled: bytes
    name: str
    base: str
    instruments: list[str] | str = "off"


class Job(Record, frozen=True):
    """One attempt, for one process. root: trace and span id of the attempt, 24 bytes. otlp_endpoint: as of SpanRecorder."""

    attempt: AttemptedRollout
    resources: dict[str, LLM | PromptTemplate]
    host: Host
    timeout_seconds: float
    root: bytes
    otlp_endpoint: str | None


class Rows(Record, frozen=True, tag="rows"):
    """Rows of spans that the agent's process has recorded."""

    rows: list[dict[str, Any]]


class End(Record, frozen=True, tag="end"):
    """The agent is done. lost: spans that could not be kept, by the reason."""

    outcome: Outcome
    lost: dict[str, int]


def framed(record: Record) -> bytes:
    """`record` as a frame. Numbers of other libraries (NumPy's) go as plain ones; TypeError for what has no plain form."""
    body = msgspec.msgpack.encode(record, enc_hook=_plain)
    return len(body).to_bytes(HEAD, "big") + body


def size_of(head: bytes) -> int:
    """The length of the frame that `head` begins."""
    return int.from_bytes(head, "big")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a span may hold JSON values only, got {type(value).__name__}")
