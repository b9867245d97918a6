"""Ctrl-C and SIGTERM as one KeyboardInterrupt that cannot get lost, and that cannot interrupt the clean-up.

Python raises KeyboardInterrupt wherever the main thread happens to be; inside a destructor or a lock's release it is printed and
forgotten, and the run would go on. So the signal is repeated by an interval timer until the clean-up begins. Used by the session.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

REPEAT = 0.3  # seconds between repetitions of an interrupt that nobody took

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """`arm` after anything that installs handlers of its own (Ray does); `leave` when the clean-up begins; `restore` at its end.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._leaving = False

    def arm(self) -> None:
        """Take over SIGINT and SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*SIGNALS, signal.SIGALRM):
            before = signal.signal(number, self._interrupt)
            self._previous.setdefault(number, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:
            return  # the clean-up has its own deadlines; a second Ctrl-C must not leave processes behind
        signal.setitimer(signal.ITIMER_REAL, REPEAT)
        raise KeyboardInterrupt

    def leave(self) -> None:
        """From now on signals change nothing."""
        self._leaving = True
        if self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
