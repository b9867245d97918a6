"""A recorded model call as a node of its session's tree, and what makes two messages the same.

Called by: session.py (which explains the whole), record.py. Pure data and hashing. Test alone:
`pytest tests/property/test_gateway_session.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

MessageKey = tuple[str, tuple[tuple[str, str], ...]]


class Point(StrEnum):
    """Where in a call's sequence a later call may go on."""

    PROMPT = "prompt"  # behind its prompt: another answer to the same, or an edited answer
    BODY = "body"  # behind its response without the id that ended it
    FULL = "full"  # behind all of it


@dataclass(frozen=True, eq=False)
class Call:
    """A recorded call: a node of the tree. Holds its own part of text and ids only; `parent` and `point` lead to the rest.

    Ids are arrays of 32 bits: a session lives as long as its attempt, and as Python's numbers they would take nine times as much."""

    call_id: str
    parent: Call | None
    point: Point | None
    rest_text: str
    rest_ids: array[int]
    body_text: str
    end_text: str  # text of the id that ended the turn; empty: cut by length
    response_ids: array[int]
    key: MessageKey
    tool_ids: tuple[str | None, ...]
    num_messages: int
    chain: str  # hash over the messages of its request
    tools: str  # hash over the tools of its request
    num_prompt_ids: int
    reasoning: str = ""  # the thoughts that were returned apart from the content
    before: tuple[Call, ...] = ()  # of a cut prompt (overlong.py): whose words were in it

    def num_ids(self, point: Point) -> int:
        """Tokens of the whole sequence up to a point."""
        response = len(self.response_ids) - (1 if self.end_text else 0)
        extra = {Point.PROMPT: 0, Point.BODY: response, Point.FULL: len(self.response_ids)}
        return self.num_prompt_ids + extra[point]

    def ids(self, point: Point) -> list[int]:
        """The exact ids of the whole sequence up to a point."""
        parts: list[array[int]] = []
        call: Call | None = self
        upto: Point | None = point
        while call is not None and upto is not None:
            parts.append(call.response_ids[: call.num_ids(upto) - call.num_prompt_ids])
            parts.append(call.rest_ids)
            upto, call = call.point, call.parent
        whole = array("i")
        for part in reversed(parts):
            whole += part
        return whole.tolist()

    def said(self, point: Point) -> list[Call]:
        """The calls whose responses are in the sequence up to a point, newest first."""
        found = [] if point is Point.PROMPT else [self]
        call, parent = self, self.parent
        while parent is not None:
            if call.point is not Point.PROMPT:
                found.append(parent)
            call, parent = parent, parent.parent
        return [*found, *call.before]


def message_key(message: dict[str, Any]) -> MessageKey:
    """What makes two assistant messages the same: content without outer white space, tool calls by name and JSON value."""
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments)
            except msgspec.DecodeError:
                arguments = arguments.strip()
        canonical = msgspec.json.encode(arguments, order="sorted").decode()
        calls.append((str(call["function"]["name"]), canonical))
    return (message.get("content") or "").strip(), tuple(calls)


def thoughts(message: dict[str, Any]) -> str:
    """An assistant message's thoughts without outer white space; empty: none."""
    return (message.get("reasoning_content") or "").strip()


def tool_ids(message: dict[str, Any]) -> tuple[str | None, ...]:
    """The ids of an assistant message's tool calls, in order."""
    return tuple(call.get("id") for call in message.get("tool_calls") or [])


def message_chain(messages: list[dict[str, Any]]) -> list[str]:
    """Hashes of the first 0, 1, ..., M messages."""
    chains = [""]
    for message in messages:
        chains.append(short_hash([chains[-1], message]))
    return chains


def short_hash(value: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=8).hexdigest()
