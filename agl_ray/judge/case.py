"""What is judged, and what comes of it.

A `Case` is an attempt as a judge sees it: the task and the model calls, put together again from their spans, without ids of rollouts, so
that the same work has the same hash. A `Verdict` is what the judge says of it.
Who calls it: settle.py makes cases, judges read them. Test alone: tests/unit/test_judge_bench.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from agl_ray.spans import KIND_CALL
from agl_ray.tracing import names
from agl_ray.types import InputError, Record, Rollout


class JudgedCall(Record, frozen=True):
    """One model call. messages: the whole request, in OpenAI's form; response: the message that answered it;
    tags: of the request's metadata (`make_tag_attributes`)."""

    call_id: str
    role: str | None
    messages: list[Any]
    response: Any
    tags: tuple[str, ...] = ()


class Case(Record, frozen=True):
    """An attempt to be judged. reward: what its agent returned or emitted, if it did."""

    task: Any
    mode: str | None
    reward: float | None
    calls: list[JudgedCall]

    @property
    def messages(self) -> list[Any]:
        """The conversation that the agent ended with, the model's last answer included; empty where there was no call."""
        return [*self.calls[-1].messages, self.calls[-1].response] if self.calls else []

    def digest(self) -> str:
        """Hash of what is judged: not of the calls' ids, which differ between attempts with the same content."""
        calls = [(one.role, one.messages, one.response, one.tags) for one in self.calls]
        content = msgspec.json.encode(
            (self.task, self.mode, self.reward, calls), order="deterministic"
        )
        return hashlib.sha256(content).hexdigest()


class Verdict(Record, frozen=True):
    """reward: of the attempt; dimensions: further rewards of it by name; calls: rewards of single calls by `call_id`; tags:
    rewards by tag, each for the calls that have it (one that no call has goes to none); comment: for people."""

    reward: float
    dimensions: dict[str, float] = {}
    calls: dict[str, float] = {}
    tags: dict[str, float] = {}
    comment: str | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(tag, str) and tag for tag in self.tags):
            raise InputError(f"verdict: tags: expected texts, got {list(self.tags)}")
        parts = (self.dimensions, self.calls, self.tags)
        rewards = (item for part in parts for item in part.items())
        for name, value in (("reward", self.reward), *rewards):
            if not isinstance(value, bool | int | float) or not math.isfinite(value):
                raise InputError(f"verdict: {name}: expected a finite number, got {value!r}")


def case_of(rollout: Rollout, rows: Iterable[Mapping[str, Any]], reward: float | None) -> Case:
    """The case of an attempt with the spans `rows` (decoded, in order of sequence)."""
    whole: dict[str, list[Any]] = {}
    calls: list[JudgedCall] = []
    for row in rows:
        if row["kind"] != KIND_CALL:
            continue
        request = row["attributes"].get("request") or {}
        response = row["attributes"].get("response")
        shared = whole.get(row["parent_call"], [])[: request.get("messages_from") or 0]
        given = request.get("messages") or [_raw_prompt(row)]
        whole[row["span_id"]] = [*shared, *given, response]
        messages = [*shared, *given]
        calls.append(JudgedCall(row["span_id"], row["role"], messages, response, _tags(request)))
    return Case(task=rollout.input, mode=rollout.mode, reward=reward, calls=calls)


def _raw_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt without messages, from the call that it goes on from."""
    session = row["attributes"].get("agl.session") or {}
    return {"role": "prompt", "content": session.get("rest", "")}


def _tags(request: Mapping[str, Any]) -> tuple[str, ...]:
    metadata = request.get("metadata") or {}
    return tuple(str(tag) for key, tag in metadata.items() if key.startswith(f"{names.TAG}."))
