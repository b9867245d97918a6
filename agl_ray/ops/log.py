"""Logging: JSON lines in the run folder, short lines on stderr; keys and tokens are masked in both.

`setup_logging(folder)` in each process that should write to `folder/log.jsonl` (lines are appended whole, so several processes may).
Test alone: tests/unit/test_ops_log.py.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

FILE_NAME = "log.jsonl"
MASK = "***"
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
_SHORTEST = 8  # characters; a shorter value of a variable would mask ordinary words

# Each keeps its first group and masks the rest.
_PATTERNS = [
    re.compile(r"(\bsk-)[A-Za-z0-9_-]{8,}"),
    re.compile(r"(\bhf_)[A-Za-z0-9]{8,}"),
    re.compile(r"(\bgh[pousr]_)[A-Za-z0-9]{8,}"),
    re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE),
    re.compile(
        r"""(\b[\w-]*(?:api[_-]?key|token|secret|password|passwd)["']?\s*[=:]\s*["']?)[^\s"',;&]{6,}""",
        re.IGNORECASE,
    ),
    re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)"),
]


class Masker:
    """Takes keys out of text: by their shape, and by value where an environment variable holds them."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        held = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)]
        known = {value for value in [*held, *secrets] if len(value) >= _SHORTEST}
        # Longest first, so that a secret inside a longer one does not leave its rest.
        ordered = sorted(known, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def mask(self, text: str) -> str:
        if self._values is not None:
            text = self._values.sub(MASK, text)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<1>{MASK}", text)
        return text


class _JsonLines(logging.Formatter):
    def __init__(self, masker: Masker, process: str) -> None:
        super().__init__()
        self._masker, self._process = masker, process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": self._masker.mask(record.getMessage()),
        }
        if record.exc_info:
            line["error"] = self._masker.mask(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


class _ShortLines(logging.Formatter):
    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self._masker = masker

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{stamp} {record.levelname.lower()} {record.name}: {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return self._masker.mask(text)


class _Screen(logging.Handler):
    """To what stderr is when a line comes: progress bars put a stream of their own there, and notebooks and test runners close theirs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001  logging's own way with a handler that fails
            self.handleError(record)


def setup_logging(
    folder: Path | None,
    *,
    process: str = "driver",
    level: int = logging.INFO,
    console: int | None = logging.WARNING,
    secrets: Iterable[str] = (),
) -> None:
    """Send the logs of `agl_ray` and `actors` to `folder/log.jsonl` (from `level`) and to stderr (from `console`).

    None leaves that one out. Called again, it replaces what it set before. `secrets`: values to mask besides those found.
    """
    masker = Masker(secrets)
    handlers: list[logging.Handler] = []
    if folder is not None:
        file = logging.FileHandler(Path(folder) / FILE_NAME, encoding="utf-8", delay=True)
        file.setFormatter(_JsonLines(masker, process))
        file.setLevel(level)
        handlers.append(file)
    if console is not None:
        screen = _Screen(console)
        screen.setFormatter(_ShortLines(masker))
        handlers.append(screen)
    for name in ("agl_ray", "actors"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(min([handler.level for handler in handlers], default=level))
        logger.propagate = False
