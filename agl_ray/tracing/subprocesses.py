"""Programs that an agent starts: OpenTelemetry's standard variables tell them where their spans belong.

`child_variables()` gives them for the rollout of here. After `follow_subprocesses()` every `subprocess.Popen` (and so asyncio's processes)
started inside of a rollout has them in its environment:

    OTEL_RESOURCE_ATTRIBUTES               rollout and attempt id, added to those that are there
    TRACEPARENT                            the trace of the attempt, and the span that started the program
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT     the store's OTLP door, where it is open (`store.door`)
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL     http/protobuf, with it
    OTEL_EXPORTER_OTLP_TRACES_HEADERS      the door's key, where this process has it (AGL_STORE_API_KEY)
    OTEL_TRACES_EXPORTER                   otlp, with it

A program that has been given an OTLP endpoint of its own keeps it. Not served: `multiprocessing` (its processes inherit this one's
environment) and event loops that start processes by themselves (uvloop); give those `env={**os.environ, **child_variables()}`.

Who calls it: the runner; whoever starts programs for an agent. Test alone: tests/unit/test_tracing_subprocesses.py.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from agl_ray.spans.otel import ATTEMPT_ID, ROLLOUT_ID
from agl_ray.tracing.recorder import SpanRecorder, current_recorder, recorder_here

RESOURCE = "OTEL_RESOURCE_ATTRIBUTES"
TRACEPARENT = "TRACEPARENT"
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_ENDPOINTS = (ENDPOINT, "OTEL_EXPORTER_OTLP_ENDPOINT")
KEY = "AGL_STORE_API_KEY"

_init = subprocess.Popen.__init__
_signature = inspect.signature(_init)


def child_variables(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What to add to the environment `base` (None: this process's) of a program that the rollout of here starts.

    RuntimeError outside of a rollout.
    """
    return _variables(current_recorder(), os.environ if base is None else base)


def _variables(recorder: SpanRecorder, base: Mapping[str, str]) -> dict[str, str]:
    above, _ = recorder.parent()
    given = [
        one
        for one in base.get(RESOURCE, "").split(",")
        if one.strip() and one.partition("=")[0].strip() not in (ROLLOUT_ID, ATTEMPT_ID)
    ]
    own = ((ROLLOUT_ID, recorder.rollout_id), (ATTEMPT_ID, recorder.attempt_id))
    variables = {
        RESOURCE: ",".join([*given, *(f"{name}={quote(value)}" for name, value in own)]),
        TRACEPARENT: f"00-{above.trace_id:032x}-{above.span_id:016x}-01",
    }
    if recorder.otlp_endpoint and not any(base.get(name) for name in _ENDPOINTS):
        variables |= {
            ENDPOINT: recorder.otlp_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_TRACES_EXPORTER": "otlp",
        }
        if base.get(KEY):
            header = f"authorization={quote('Bearer ' + base[KEY])}"
            variables["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] = header
    return variables


def follow_subprocesses() -> None:
    """Give the variables to every program that is started inside of a rollout; calling it again changes nothing."""
    setattr(subprocess.Popen, "__init__", _init_telling)  # noqa: B010  mypy refuses to assign a method


@functools.wraps(_init)
def _init_telling(*args: Any, **kwargs: Any) -> None:
    recorder = recorder_here()
    if recorder is not None:
        try:
            bound = _signature.bind(*args, **kwargs)
        except TypeError:  # the call below says what is wrong
            return _init(*args, **kwargs)
        given = bound.arguments.get("env")
        base = os.environ if given is None else given
        # Names and values may be bytes there; the standard ones are text.
        bound.arguments["env"] = {**base, **_variables(recorder, _texts(base))}
        args, kwargs = bound.args, bound.kwargs
    return _init(*args, **kwargs)


def _texts(environment: Mapping[Any, Any]) -> dict[str, str]:
    return {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
