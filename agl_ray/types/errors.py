"""The one exception hierarchy of the house.

Every error that a person may meet derives from `AglError` and carries a whole sentence: what it was about, what was
expected, what was got, what to do. `exit_code` is what the command line returns for it (2: the input was wrong,
1: the run failed).
"""

from __future__ import annotations


class AglError(Exception):
    """Base of every error raised on purpose by agl_ray."""

    exit_code = 1


class InputError(AglError, ValueError):
    """What the user gave is wrong: configuration, data, agent, model folder, address. The run never started or could not."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key is unknown, badly valued, or contradicts another. The message names the key."""


class AgentFailure(InputError):
    """The agent itself is at fault (it raised, or returned something that is no reward) on every row it was tried on."""


class RunError(AglError, RuntimeError):
    """The run failed while running: a group that cannot be rebuilt, an engine that does not come up, ..."""


class WaitTimeout(RunError, TimeoutError):
    """A named wait on another process passed its deadline. `on` says what was waited for, `seconds` how long."""

    def __init__(self, on: str, seconds: float, hint: str = "") -> None:
        super().__init__(f"waited {seconds:g} s for {on} and gave up{': ' + hint if hint else ''}")
        self.on, self.seconds, self.hint = on, seconds, hint

    def __reduce__(self) -> tuple[type, tuple[str, float, str]]:
        return (WaitTimeout, (self.on, self.seconds, self.hint))


class StoreError(RunError):
    """The store refused or failed an operation (journal not writable, corrupted, ...)."""


class NotFound(AglError, LookupError, ValueError):
    """A rollout, attempt, resource or worker id that the store does not know (a ValueError, as agent-lightning's is)."""


class Conflict(AglError):
    """An operation that contradicts the state of a record, such as ending an attempt that ended differently."""


class KnownSpans(Conflict):
    """Spans that the store has already. `ids`: theirs, joined by commas."""

    def __init__(self, ids: str) -> None:
        super().__init__(f"spans {ids} are in the store already")
        self.ids = ids

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (KnownSpans, (self.ids,))


class EngineError(AglError):
    """The inference engine failed or vanished while answering; the attempt ends `engine_error`, never with a reward."""


class WeightSyncError(RunError):
    """A weight version could not be delivered: lost peer, wrong checksum, wrong shapes."""
