"""Damage in the write-ahead log that a killed store left: a cut commit is recovered from, anything else is said."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

import pytest

from agl_ray.store.journals import sqlite_log
from agl_ray.store.journals.sqlite_log import FRAME, HEADER, check_log
from agl_ray.types import StoreError

COMMITS = 30


@pytest.fixture(params=[512, 4096])
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file whose last owner was killed: thirty commits are in its log, behind older ones."""
    path = tmp_path / "whole.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {request.param}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE a (b)")
    connection.execute("INSERT INTO a VALUES (?)", ("before" * 100_000,))
    connection.execute("PRAGMA wal_checkpoint(RESTART)")  # the next commit begins the log again
    for number in range(COMMITS):
        connection.execute("INSERT INTO a VALUES (?)", (str(number) * 300,))
    copy = tmp_path / "store.db"
    for name in ("", "-wal"):
        copy.with_name(copy.name + name).write_bytes(path.with_name(path.name + name).read_bytes())
    connection.close()
    return copy


class Log:
    """The frames of this generation."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + "-wal")
        self.content = bytearray(self.path.read_bytes())
        self.page = struct.unpack(">I", self.content[8:12])[0]
        salts = self.content[16:24]
        self.ends = []  # offset behind each frame
        self.commits = []  # numbers of frames
        at = HEADER
        while self.content[at + 8 : at + 16] == salts:
            if self.content[at + 4 : at + 8] != bytes(4):
                self.commits.append(len(self.ends))
            at += FRAME + self.page
            self.ends.append(at)
        assert len(self.commits) == COMMITS
        assert len(self.content) > at  # older frames follow

    def flip(self, offset: int) -> None:
        self.content[offset] ^= 4
        self.path.write_bytes(self.content)


def rows(path: Path) -> int:
    connection = sqlite3.connect(path)
    number = connection.execute("SELECT COUNT(*) FROM a").fetchone()[0]
    connection.close()
    return int(number) - 1


def test_a_whole_log_is_well(left: Path) -> None:
    check_log(left)
    assert rows(left) == COMMITS
    check_log(left)  # it is gone


def test_a_commit_that_was_cut_off_is_no_damage(left: Path) -> None:
    """As a kill leaves it: a frame's head with what was there before in place of its page, or half a commit."""
    log = Log(left)
    end, salts = log.ends[-1], bytes(log.content[16:24])
    torn = struct.pack(">II", 2, 9) + salts + bytes(8) + b"half a page"
    log.content[end : end + len(torn)] = torn
    log.path.write_bytes(log.content)
    check_log(left)
    log.path.write_bytes(log.content[: end + FRAME + 5])
    check_log(left)
    assert rows(left) == COMMITS


@pytest.mark.parametrize("where", ["page", "sum", "salt", "first", "header"])
def test_damage_before_a_whole_commit_is_said(
    left: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_log, "PIECE", 3 * (FRAME + Log(left).page))  # many pieces
    log = Log(left)
    begin = log.ends[log.commits[9]]  # of the first frame behind the tenth commit
    places = {"page": begin + FRAME + 7, "sum": begin + 17, "salt": begin + 9, "first": HEADER + 99}
    log.flip(places.get(where, 25))
    with pytest.raises(StoreError, match="commits behind the damage") as caught:
        check_log(left)
    number = int(str(caught.value).split(" commits behind")[0].rpartition(" ")[2])
    expected = COMMITS if where in ("first", "header") else COMMITS - 10
    assert (
        expected - 2 <= number <= expected
    )  # a damaged frame that is a commit itself is not counted
    monkeypatch.undo()
    with pytest.raises(StoreError, match=f"{number} commits"):
        check_log(left)
    assert rows(left) == COMMITS - expected  # SQLite says nothing


def test_what_is_no_log_is_left_to_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    check_log(path)
    for content in (b"", b"short", b"x" * 100, bytes(5000)):
        path.with_name("store.db-wal").write_bytes(content)
        check_log(path)
