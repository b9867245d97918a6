"""Which attempts a request made: a dequeue or start call that is repeated gives the same answer and takes nothing twice.

What it is: `Requests`. Every attempt carries the id of its request in its metadata. While an attempt is open its request is known, after a restart,
too. Ids that callers chose are known for longer: the newest `KEPT` of this life of the store, whatever became of their attempts.
(A start call names its rollout, so `agl_ray.store.machine` finds its attempt there for ever.)
Who calls it: `agl_ray.store.state`. Test alone: tests/unit/test_store_requests.py.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from agl_ray.store.journals.base import AttemptKey
from agl_ray.types import Attempt, InputError, new_id

REQUEST_ID = "request_id"
"""Key in `Attempt.metadata` of the dequeue or start call that made the attempt."""

KEPT = 10_000  # requests with ids of callers; about 400 bytes each
OWN = "rq"  # how ids begin that the client made for one call: nobody else can repeat it


def request_id_of(given: str | None) -> str:
    """The id of a call: the given one, or a fresh one."""
    if given is None:
        return new_id(OWN)
    if given.startswith(f"{OWN}-"):
        raise InputError(
            f"request_id {given!r}: ids that begin with {OWN}- are the client's own; choose another"
        )
    return given


def rollout_id_of(request_id: str) -> str:
    """The id of the rollout that a start call makes: a repetition names the same one, however late it comes."""
    return f"ro-{hashlib.sha256(request_id.encode()).hexdigest()[:24]}"


class Requests:
    """`open`: by request id the open attempts that it made, in order. `kept`: by ids that callers chose all that they made."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self.open: dict[str, list[AttemptKey]] = {}
        self.kept: OrderedDict[str, list[AttemptKey]] = OrderedDict()

    def made_by(self, request_id: str | None) -> Sequence[AttemptKey]:
        """What the request made, in order; nothing where it is new, or not known any more."""
        if request_id is None:
            return ()
        return self.kept.get(request_id) or self.open.get(request_id) or ()

    def began(self, attempt: Attempt) -> None:
        request_id = _request_of(attempt)
        if request_id is None:
            return
        key = (attempt.rollout_id, attempt.attempt_id)
        self.open.setdefault(request_id, []).append(key)
        if not request_id.startswith(f"{OWN}-"):
            self.kept.setdefault(request_id, []).append(key)
            if len(self.kept) > self._most:
                self.kept.popitem(last=False)

    def ended(self, attempt: Attempt) -> None:
        _remove(self.open, attempt)

    def forgotten(self, attempts: Iterable[Attempt]) -> None:
        """They were removed from the store."""
        for attempt in attempts:
            _remove(self.kept, attempt)


def _remove(of: dict[str, list[AttemptKey]], attempt: Attempt) -> None:
    request_id = _request_of(attempt)
    keys = [] if request_id is None else of.get(request_id, [])
    key = (attempt.rollout_id, attempt.attempt_id)
    if request_id is not None and key in keys:
        keys.remove(key)
        if not keys:
            del of[request_id]


def _request_of(attempt: Attempt) -> str | None:
    """Imported attempts may have anything under that name."""
    found = attempt.metadata.get(REQUEST_ID)
    return found if isinstance(found, str) else None
