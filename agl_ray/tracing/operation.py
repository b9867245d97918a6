"""`operation`: a unit of work as a span, around a block or a function.

    @agl.operation                        with agl.operation(name="search", index="wiki") as op:
    def lookup(query): ...                    op.set_input(query=query)
                                              op.set_output(found)

What is recorded inside is its child: emitters, other operations, spans of OpenTelemetry; also in the tasks and threads started there.
A function's arguments and result are recorded as `agentlightning.operation.input.*` and `.output`; an exception marks the span ERROR
and goes on. Outside of a rollout nothing is recorded and the work is done all the same, so that tools can be used and tested alone.

Who calls it: agents, as `agl.operation`. Test alone: tests/unit/test_tracing_operation.py.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from agl_ray.spans import KIND_SPAN, new_span_id
from agl_ray.spans.objects import span_object
from agl_ray.spans.otel_values import clean
from agl_ray.spans.schema import SPAN_SCHEMA
from agl_ray.tracing import names
from agl_ray.tracing.emit import exception_event
from agl_ray.tracing.recorder import SpanRecorder, recorder_here
from agl_ray.tracing.values import flatten
from agl_ray.types import InputError, Span

Function = TypeVar("Function", bound=Callable[..., Any])


class Operation:
    """A context manager for one piece of work, or a decorator; made by `operation`."""

    def __init__(self, attributes: Mapping[str, Any], propagate: bool = True) -> None:
        self._given = flatten(attributes, "") if attributes else {}
        self._propagate = propagate
        self._recorder: SpanRecorder | None = None
        self._row: dict[str, Any] | None = None
        self._token: Any = None

    def __enter__(self) -> Self:
        if self._row is not None:
            raise RuntimeError("operation: entered already; make a new one for each block")
        self._recorder = recorder_here() if self._propagate else None
        self._row = {
            "rollout_id": "",
            "attempt_id": "",
            "span_id": new_span_id(),
            "name": names.OPERATION_SPAN,
            "kind": KIND_SPAN,
            "status": "OK",
            "attributes": dict(self._given),
            "start_ns": time.time_ns(),
        }
        if self._recorder is not None:
            self._begin(self._recorder, self._row)
        return self

    def _begin(self, recorder: SpanRecorder, row: dict[str, Any]) -> None:
        """Make this the parent of what comes inside, and known as unfinished until it ends."""
        above, parent_id = recorder.parent()
        number = int(row["span_id"], 16)
        row |= {"rollout_id": recorder.rollout_id, "attempt_id": recorder.attempt_id}
        row |= {"trace_id": f"{above.trace_id:032x}", "parent_id": parent_id}
        recorder.began(number, functools.partial(_unfinished, row))
        own = SpanContext(above.trace_id, number, False, TraceFlags(1))
        self._token = otel_context.attach(trace.set_span_in_context(NonRecordingSpan(own)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        row, recorder = self._open_row(), self._recorder
        row["end_ns"] = time.time_ns()
        if error is not None:
            row |= {"status": "ERROR", "status_message": clean(f"{type(error).__name__}: {error}")}
            row["events"] = [exception_event(error)]
        if recorder is not None:
            otel_context.detach(self._token)
            recorder.finish(int(row["span_id"], 16), row)

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record what the work is given."""
        if args:
            self._note(names.OPERATION_INPUT + ".args", dict(enumerate(args)))
        if kwargs:
            self._note(names.OPERATION_INPUT, kwargs)

    def set_output(self, output: Any) -> None:
        """Record what the work gives."""
        self._note(names.OPERATION_OUTPUT, output)

    def _note(self, name: str, value: Any) -> None:
        row = self._open_row()
        if self._recorder is not None or not self._propagate:
            # A new map: the row may be read in another thread, where the attempt ends now.
            row["attributes"] = row["attributes"] | flatten(value, name)

    def span(self) -> Span:
        """The span, once the block is over; RuntimeError before."""
        if self._row is None or "end_ns" not in self._row:
            raise RuntimeError("operation: expected the block to be over, got one that is not")
        return span_object(dict.fromkeys(SPAN_SCHEMA.names) | self._row)

    def _open_row(self) -> dict[str, Any]:
        if self._row is None or "end_ns" in self._row:
            raise RuntimeError("operation: expected to be inside of its `with` block")
        return self._row

    def __call__(self, function: Function) -> Function:
        """`function`, each call of it an operation with its arguments and its result."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InputError(
                f"operation: {function.__qualname__}: expected a function or a coroutine function, got a generator; "
                "use `with agl.operation(...)` where it is read"
            )
        given = {names.OPERATION_NAME: function.__name__, **self._given}
        signature = inspect.signature(function)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with Operation(given, self._propagate) as one:
                    one._note(names.OPERATION_INPUT, _arguments(signature, args, kwargs))
                    result = await function(*args, **kwargs)
                    one.set_output(result)
                    return result

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with Operation(given, self._propagate) as one:
                one._note(names.OPERATION_INPUT, _arguments(signature, args, kwargs))
                result = function(*args, **kwargs)
                one.set_output(result)
                return result

        return run  # type: ignore[return-value]


@overload
def operation(
    function: Function, *, propagate: bool = ..., name: str | None = ..., **attributes: Any
) -> Function: ...


@overload
def operation(
    function: None = ..., *, propagate: bool = ..., name: str | None = ..., **attributes: Any
) -> Operation: ...


def operation(
    function: Any = None, *, propagate: bool = True, name: str | None = None, **attributes: Any
) -> Any:
    """A block or a function as an operation, see the module. `attributes` go onto its span; `tags=[...]` put tags on it.

    propagate: False only makes the span, for `op.span()`. InputError for a generator function, or where the name is given twice.
    """
    if name is not None:
        if names.OPERATION_NAME in attributes:
            raise InputError(f"operation: expected name or {names.OPERATION_NAME}, got both")
        attributes[names.OPERATION_NAME] = name
    attributes |= names.make_tag_attributes(attributes.pop("tags", ()))
    made = Operation(attributes, propagate)
    if function is None:
        return made
    if not callable(function):
        raise InputError(
            f"operation: expected a function, got {function!r}; a name is given as operation(name=...)"
        )
    return made(function)


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, without `self` and `cls`; as they came where they do not fit (the call itself says why)."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {"args": args, "kwargs": kwargs}
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in ("self", "cls")}


def _unfinished(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an operation that is still open when its attempt ends."""
    return {
        **row,
        "end_ns": time.time_ns(),
        "status": "UNSET",
        "attributes": {**row["attributes"], names.UNFINISHED: True},
    }
