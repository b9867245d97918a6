"""How much one attempt may ask for: `gateway.max_calls` and `gateway.max_tokens_per_rollout`.

Called by the door. A call beyond a limit is refused with status 429; the first one is recorded as a span, all are counted. Test alone:
`pytest tests/unit/test_gateway_policies.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agl_ray.gateway.attempts import Live
from agl_ray.gateway.canonical import Refusal

TOO_MANY_CALLS = "rollout_calls_used_up"
TOO_MANY_TOKENS = "rollout_tokens_used_up"


@dataclass
class Admission:
    """An admitted call. It counts as underway until it counts as answered, or has ended without an answer."""

    live: Live
    underway: bool = False

    def begin(self) -> None:
        self.live.underway += 1
        self.underway = True

    def end(self) -> None:
        """May come twice: a stream's answer is counted before its last pieces are sent, and then the stream ends."""
        self.live.underway -= self.underway
        self.underway = False

    def answered(self) -> None:
        """Count it as answered, and as underway no more: at no time as both."""
        self.end()
        self.live.counts["calls"] += 1


@dataclass(frozen=True)
class Limits:
    """calls: answered and open ones of an attempt, all roles; tokens: of their responses together. None: no limit."""

    calls: int | None = None
    tokens: int | None = None

    @contextmanager
    def admitted(self, live: Live) -> Iterator[Admission]:
        """While a call is underway; Refusal where the attempt has used up what it may ask for."""
        if self.calls is not None and live.counts["calls"] + live.underway >= self.calls:
            raise _used_up(f"gateway.max_calls ({self.calls})", TOO_MANY_CALLS)
        left = self.tokens_left(live)
        if left is not None and left < 1:
            limit = f"gateway.max_tokens_per_rollout ({self.tokens})"
            raise _used_up(limit, TOO_MANY_TOKENS)
        admission = Admission(live)
        admission.begin()
        try:
            yield admission
        finally:
            admission.end()

    def tokens_left(self, live: Live) -> int | None:
        """Response tokens that a call may still have; None: as many as it wants. Calls open at the same time do not know of each other's."""
        return None if self.tokens is None else self.tokens - live.counts["response_tokens"]


def _used_up(limit: str, code: str) -> Refusal:
    message = f"this attempt has used up {limit}: it can make no more calls, now or later; end the rollout"
    return Refusal(429, message, code=code, kind="rate_limit_error")
