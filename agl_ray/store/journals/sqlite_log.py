"""Damage in the write-ahead log of a SQLite journal that its owner left behind: `check_log`.

What it is: SQLite itself reads a log up to the first frame that is not whole and drops the rest without a word, because a commit that was cut off by a
crash looks so. Where a whole commit follows a frame that is not whole, no crash did that: commits that were answered would
be lost, so it is an error. (One case cannot be told from a crash: damage in the very last frame.)
The format is SQLite's (https://www.sqlite.org/fileformat2.html#the_write_ahead_log): a header of 32 bytes, then frames of 24 bytes
and a page each; every frame has the checksum of all before it.
Who calls it: `agl_ray.store.journals.sqlite`, before SQLite sees the file. Test alone: tests/unit/test_store_sqlite_log.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agl_ray.types import StoreError

HEADER = 32
FRAME = 24  # bytes before a frame's page
MAGIC = {0x377F0682: "<u4", 0x377F0683: ">u4"}  # the words of its checksums
MOST_PAGE = 65536
LOW = np.uint64(2**32 - 1)
PIECE = 2**26  # bytes of the log read at once

Words = npt.NDArray[np.uint32]


def check_log(path: Path) -> None:
    """StoreError where the log of the SQLite file at `path` has a whole commit behind a damaged frame. Nothing is changed; without a log
    all is well."""
    log = path.with_name(path.name + "-wal")
    try:
        with log.open("rb") as file:
            head = file.read(HEADER)
            if len(head) < HEADER:
                return
            lost = _commits_behind_damage(head, file)
    except FileNotFoundError:
        return
    if lost:
        raise StoreError(
            f"store journal {path}: its write-ahead log is damaged, and {lost} commits behind the damage cannot be read; restore "
            f"{path.name} and {log.name} together from a copy; to go on without what is behind the damage: sqlite3 {path} 'PRAGMA "
            "wal_checkpoint(TRUNCATE)'"
        )


def _commits_behind_damage(head: bytes, file: Any) -> int:
    words = np.frombuffer(head, ">u4").astype(np.uint32)
    order, page = MAGIC.get(int(words[0])), int(words[2])
    if order is None or not 512 <= page <= MOST_PAGE or page & (page - 1):
        return 0  # no log; SQLite will say what it thinks of the file
    salts, before = words[4:6], words[6:8]
    whole = bool((_sum(head[:24], order) == before).all())
    lost = 0
    while piece := file.read((PIECE // (FRAME + page)) * (FRAME + page)):
        number = len(piece) // (FRAME + page)
        frames = np.frombuffer(piece, np.uint8, number * (FRAME + page))
        frames = frames.reshape(number, FRAME + page)
        facts = frames[:, :FRAME].copy().view(">u4").astype(np.uint32)  # page, size, salts, sums
        previous = np.vstack([before, facts[:-1, 4:]])
        # Against what its predecessor says of itself: so frames behind a damaged one can be told to be whole.
        covered = np.hstack([frames[:, :8], frames[:, FRAME:]]).copy().view(order)
        good = (facts[:, 2:4] == salts).all(1) & (_chain(previous, covered) == facts[:, 4:]).all(1)
        behind = np.logical_or.accumulate(np.concatenate([[not whole], ~good]))[:-1]
        lost += int((good & behind & (facts[:, 1] != 0)).sum())
        whole, before = whole and bool(good.all()), facts[-1, 4:]
    return lost


def _sum(data: bytes, order: str) -> Words:
    return _chain(np.zeros((1, 2), np.uint32), np.frombuffer(data, order)[None, :])[0]


def _chain(start: Words, words: npt.NDArray[Any]) -> Words:
    """SQLite's checksum of each row of words, begun with each row of `start`: for every pair of words (a, b) s0 += a + s1, s1 += b + s0.
    That is linear in the words and the start, modulo 2**32, so it is a product with numbers that depend on the length alone."""
    of_words, of_start = _factors(words.shape[1])
    with np.errstate(over="ignore"):
        made: Words = words.astype(np.uint32) @ of_words + start @ of_start
    return made


@functools.cache
def _factors(number: int) -> tuple[Words, Words]:
    """What each of `number` words, and the two of the start, add to (s0, s1)."""
    step = np.array(
        [[1, 1], [1, 2]], np.uint64
    )  # (s0, s1) after a pair of zeros: s0 + s1, s0 + 2 s1
    given = np.array([[1, 1], [0, 1]], np.uint64)  # rows: what a and b add to (s0, s1)
    found = np.zeros((number, 2), np.uint64)
    power: npt.NDArray[np.uint64] = np.eye(2, dtype=np.uint64)
    for pair in range(number // 2 - 1, -1, -1):
        found[2 * pair : 2 * pair + 2] = given @ power & LOW
        power = step @ power & LOW
    return found.astype(np.uint32), power.astype(np.uint32)
