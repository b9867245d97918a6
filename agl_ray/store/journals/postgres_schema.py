"""The tables of the PostgreSQL journal, as its statements see them, and how text rests in them.

What it is: `TABLES` (a table per kind of record), `SPANS`, `EVENTS`, `OWNER`; `Exact`, the type of their text columns. The tables are
made by the migrations beside this file (`migrations/versions`), which also have the indexes; `HEAD` is the newest of them.
Who calls it: `agl_ray.store.journals.postgres` and its parts. Test alone: tests/unit/test_store_postgres_schema.py.
"""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from agl_ray.store.journals.base import COLUMNS
from agl_ray.types import InputError

HEAD = "0001"
VERSION_TABLE = "agl_ray_version"
KINDS = tuple(COLUMNS)

# PostgreSQL's text has no character 0. The first six characters, which nobody types, become pairs of a lead (1, 2) and a trail (3, 4, 5):
# one text for one text, in the same order, and a part of a text is still a part of it (a trail never stands alone).
_PAIRS = {chr(i): chr(1 + i // 3) + chr(3 + i % 3) for i in range(6)}
_BACK = {pair: char for char, pair in _PAIRS.items()}
_TO_HIDE = re.compile("[\x00-\x05\ud800-\udfff]")
_HIDDEN = re.compile("[\x01\x02][\x03-\x05]")


def hide(text: str) -> str:
    """`text` as it rests in the database. InputError where it is no text at all (half of a surrogate pair)."""
    if _TO_HIDE.search(text) is None:
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"expected text that has an UTF-8 form, got {text!r}") from error
    return _TO_HIDE.sub(lambda found: _PAIRS[found[0]], text)


def show(text: str) -> str:
    """The text that was hidden."""
    return _HIDDEN.sub(lambda found: _BACK[found[0]], text)


class Exact(TypeDecorator[str]):
    """Text that keeps every character and sorts by code point, whatever the database's language is."""

    impl = sa.Text
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(collation="C")

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return hide(value) if isinstance(value, str) else value

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return show(value) if isinstance(value, str) else value


_TYPES: dict[type, Any] = {str: Exact(), int: sa.BigInteger(), float: sa.Double()}
metadata = sa.MetaData()


def _run_id() -> sa.Column[Any]:
    return sa.Column("run_id", Exact(), primary_key=True)


def _records(kind: str) -> sa.Table:
    return sa.Table(
        f"agl_ray_{kind}",
        metadata,
        _run_id(),
        sa.Column("key", Exact(), primary_key=True),
        sa.Column("position", sa.BigInteger(), nullable=False),
        *(sa.Column(name, _TYPES[kept]) for name, kept in COLUMNS[kind].items()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
    )


TABLES = {kind: _records(kind) for kind in KINDS}

SPANS = sa.Table(
    "agl_ray_spans",
    metadata,
    _run_id(),
    sa.Column("rollout_id", Exact(), primary_key=True),
    sa.Column("attempt_id", Exact(), primary_key=True),
    sa.Column("batch_id", Exact(), primary_key=True),
    sa.Column("first", sa.BigInteger(), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("size", sa.BigInteger(), nullable=False),
    sa.Column("crc", sa.BigInteger(), nullable=False),
    sa.Column("payload", sa.LargeBinary(), nullable=False),
)

EVENTS = sa.Table(
    "agl_ray_event",
    metadata,
    _run_id(),
    sa.Column("number", sa.BigInteger(), primary_key=True),
    sa.Column("body", sa.LargeBinary(), nullable=False),
)

OWNER = sa.Table(
    "agl_ray_owner",
    metadata,
    _run_id(),
    sa.Column("token", sa.Text(), nullable=False),  # of the store that may write
    sa.Column("starts", sa.BigInteger(), nullable=False),
    sa.Column("process", Exact(), nullable=False),  # host and pid of that store, for people
    sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("span_schema", sa.Text(), nullable=False),  # fingerprint of the payloads' schema
    sa.Column("last_event", sa.BigInteger(), nullable=False),  # of those forgotten
)
