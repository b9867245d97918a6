"""Whose a call is: its attempt and role, and the span of the agent's inside of which it was made.

The span is what the W3C header `traceparent` says, which an instrumented HTTP client sends, or our tracing (tracing/clients.py). Called by: the
HTTP surface, which makes the path; the door and the records of calls. Test alone:
`pytest tests/unit/test_gateway_caller.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_HEADER = b"traceparent"
_propagator = TraceContextTextMapPropagator()


class Caller(NamedTuple):
    """The columns of a span that is made there."""

    trace_id: str
    parent_id: str


@dataclass(frozen=True)
class CallPath:
    """Whose call it is, and inside of which span of the agent's it was made, where that is known."""

    rollout_id: str
    attempt_id: str
    role: str | None = None
    caller: Caller | None = None

    def __str__(self) -> str:
        role = f" role {self.role}" if self.role else ""
        return f"rollout {self.rollout_id} attempt {self.attempt_id}{role}"


def caller_of(headers: Iterable[tuple[bytes, bytes]]) -> Caller | None:
    """The calling span; None where the client says nothing of it, or nothing that W3C's Trace Context knows."""
    given = dict(headers).get(_HEADER)
    if given is None:
        return None
    found = _propagator.extract({"traceparent": given.decode("latin-1")}, context=Context())
    span = trace.get_current_span(found).get_span_context()
    if not span.is_valid:
        return None
    return Caller(f"{span.trace_id:032x}", f"{span.span_id:016x}")
