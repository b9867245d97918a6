"""The documents of the MongoDB journal: how rows, spans and events rest, and a `Query` as filter and sort.

What it is: pure functions. Every `_id` begins with the run's name, so runs share collections; a record's `_id` is `run/key`, which sorts as its
key does. Documents carry `group`, the number of the write they came with (see `mongo_groups`). A payload above CHUNK_BYTES rests in
documents of its own, because a document may have 16 MiB.
Who calls it: `agl_ray.store.journals.mongo` and its parts. Test alone: tests/unit/test_store_mongo_parts.py.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from agl_ray.store.journals.base import (
    COLUMNS,
    AttemptKey,
    Condition,
    EventRow,
    Query,
    Row,
    SpanRow,
)
from agl_ray.types import InputError, StoreError

Document = dict[str, Any]
Put = tuple[str, Document]
"""(collection, document)"""

KINDS = tuple(COLUMNS)
SPAN, CHUNK, EVENT, OWNER, REDO = "span", "chunk", "event", "owner", "redo"
PERMANENT = {SPAN, CHUNK}  # written once; a repetition leaves what is there
CHUNK_BYTES = 12 * 2**20
BODY_BYTES = 15 * 2**20  # of a record

INDEXES: dict[str, list[tuple[str, ...]]] = {
    "rollout": [
        ("run", "position", "_id"),
        ("run", "created", "_id"),
        ("run", "status", "created", "_id"),
        ("run", "mode", "created", "_id"),
        ("run", "start_time", "_id"),
        ("run", "end_time", "_id"),
    ],
    "attempt": [("run", "rollout_id", "position"), ("run", "end_reason", "_id")],
    "resources": [("run", "position", "_id"), ("run", "create_time", "_id")],
    "worker": [("run", "_id")],
    # Sums over spans read this index alone, not the payloads.
    SPAN: [("run", "rollout_id", "attempt_id", "first", "number", "last", "size")],
    CHUNK: [("run", "rollout_id")],
    EVENT: [("run", "number")],
    REDO: [("run", "token")],
}


def scope(run_id: str) -> str:
    """What every `_id` of a record of the run starts with."""
    return run_id.replace("%", "%25").replace("/", "%2F") + "/"


def put_row(run_id: str, row: Row, group: int) -> Put:
    if len(row.body) > BODY_BYTES:
        raise StoreError(
            f"store journal mongodb: the {row.kind} {row.key!r} has {len(row.body)} bytes and a document of MongoDB holds "
            f"{BODY_BYTES}; keep large data in files and its path in the record, or use postgresql:// or sqlite://"
        )
    return row.kind, {
        "_id": scope(run_id) + row.key,
        "run": run_id,
        "key": row.key,
        "position": row.position,
        **dict(zip(COLUMNS[row.kind], row.columns, strict=True)),
        "body": row.body,
        "group": group,
    }


def row_of(kind: str, document: Document) -> Row:
    columns = tuple(document[name] for name in COLUMNS[kind])
    return Row(kind, document["key"], document["position"], columns, bytes(document["body"]))


def put_span(run_id: str, span: SpanRow, group: int) -> Iterator[Put]:
    """The span's document, after those of its chunks where it is large."""
    name = json.dumps([run_id, *span.key, span.batch_id])
    common = {"run": run_id, "rollout_id": span.key[0], "group": group}
    size = len(span.payload)
    num_chunks = 0 if size <= CHUNK_BYTES else -(-size // CHUNK_BYTES)
    for i in range(num_chunks):
        part = span.payload[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
        yield CHUNK, {"_id": f"{name}/{i}", **common, "payload": part}
    yield (
        SPAN,
        {
            "_id": name,
            **common,
            "attempt_id": span.key[1],
            "batch_id": span.batch_id,
            "first": span.first,
            "number": span.number,
            "last": span.first + span.number - 1,
            "size": size,
            "crc": zlib.crc32(span.payload),
            "chunks": num_chunks,
            "payload": b"" if num_chunks else span.payload,
        },
    )


def chunk_ids(document: Document) -> list[str]:
    return [f"{document['_id']}/{i}" for i in range(document["chunks"])]


def span_of(document: Document, chunks: dict[str, bytes]) -> SpanRow:
    """StoreError where the payload is not what it was."""
    payload = bytes(document["payload"])
    if document["chunks"]:
        payload = b"".join(chunks.get(name, b"") for name in chunk_ids(document))
    if len(payload) != document["size"] or zlib.crc32(payload) != document["crc"]:
        raise StoreError(
            f"store journal mongodb: the spans {document['first']} to {document['last']} of rollout "
            f"{document['rollout_id']} are damaged (checksum); restore the database from a backup, or start a new run"
        )
    return SpanRow(
        document["batch_id"], key_of(document), document["first"], document["number"], payload
    )


def key_of(document: Document) -> AttemptKey:
    return document["rollout_id"], document["attempt_id"]


def put_event(run_id: str, event: EventRow, group: int) -> Put:
    name = f"{scope(run_id)}{event.number:020}"
    return EVENT, {
        "_id": name,
        "run": run_id,
        "number": event.number,
        "body": event.body,
        "group": group,
    }


# Questions.


def with_prefix(run_id: str, prefix: str) -> Document:
    """Filter: records whose key starts with `prefix`, as a range of `_id`."""
    start = scope(run_id) + prefix
    return {"_id": {"$gte": start, "$lt": _behind(start)}}


def _behind(text: str) -> str:
    """The first text that is behind all that start with `text` (which is not all U+10FFFF)."""
    text = text.rstrip("\U0010ffff")
    last = ord(text[-1]) + 1
    return text[:-1] + chr(0xE000 if last == 0xD800 else last)  # halves of pairs are no characters


def filter_of(run_id: str, query: Query, *, paged: bool) -> Document:
    """paged: only what is behind `query.after`."""
    parts = [_condition(run_id, one) for one in query.must]
    if query.where:
        word = "$or" if query.any_of else "$and"
        parts.append({word: [_condition(run_id, one) for one in query.where]})
    if paged and query.after is not None:
        parts.append(_behind_row(run_id, query))
    return {"run": run_id, **({"$and": parts} if parts else {})}


def _condition(run_id: str, condition: Condition) -> Document:
    field = condition.field
    if condition.is_in is None:
        pattern = re.escape(str(condition.contains)).replace(
            "\0", r"\x00"
        )  # BSON has none in a pattern
        return {field: {"$regex": pattern}}
    if field == "key":
        named = [scope(run_id) + str(key) for key in condition.is_in if key is not None]
        return {"_id": {"$in": named}}
    return {field: {"$in": list(condition.is_in)}}


def _behind_row(run_id: str, query: Query) -> Document:
    """An empty column sorts first, and `$gt`, `$lt` compare only values of one type."""
    value, key = query.after or (None, "")
    than = "$lt" if query.descending else "$gt"
    name = {"_id": {than: scope(run_id) + key}}
    by = query.order_by
    if by == "key":
        return name
    ties = {by: value, **name}
    if value is None:
        return ties if query.descending else {"$or": [ties, {by: {"$ne": None}}]}
    behind: list[Document] = [ties, {by: {than: value}}]
    return {"$or": [*behind, {by: None}] if query.descending else behind}


def sort_of(query: Query) -> list[tuple[str, int]]:
    way = -1 if query.descending else 1
    return [("_id", way)] if query.order_by == "key" else [(query.order_by, way), ("_id", way)]


def checked(puts: Sequence[Put]) -> Sequence[Put]:
    """InputError where a text has no UTF-8 form: the driver would fail in the middle of a write."""
    for _, document in puts:
        for value in document.values():
            if isinstance(value, str):
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"expected text that has an UTF-8 form, got {value!r}"
                    ) from error
    return puts
