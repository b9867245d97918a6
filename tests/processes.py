"""The processes of a family, for tests that look for one by its command line while others come and go."""

from __future__ import annotations

from collections.abc import Iterator

import psutil


def command_line(process: psutil.Process) -> str:
    """What `process` was started with; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


def descendants(pid: int, title: str = "") -> Iterator[psutil.Process]:
    """The living descendants of `pid` whose command line contains `title`."""
    for process in psutil.Process(pid).children(recursive=True):
        words = command_line(process)
        if words and title in words:
            yield process


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more; a zombie that nobody has waited for does not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_alive(pid: int) -> bool:
    """Whether there is such a process and it runs."""
    try:
        return not ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
