"""Token-exact sessions: what one attempt has said so far, as a tree of (rendered text so far -> exact ids). Contract 4.

The engine samples token sequences whose text would tokenise otherwise. A conversation that is continued must therefore keep
the ids that were sampled; only what is new may be tokenised. For a new request:

1. Every assistant message that is one *we returned* is replaced by the raw text that the model wrote. Frameworks reorder and
   drop fields, re-serialise the JSON of arguments and strip white space, so messages are compared by `message_key`: role,
   content without outer white space, tool calls by name and arguments as JSON values, and thoughts where the caller sends any
   back (most frameworks drop them); where several match, one with the same tool-call ids wins, then the newest. Text with a malformed tool call was returned as content and comes back the same way.
2. The conversation is rendered by the model's template, as text. If the template merely moves white space around the raw
   text (Llama's `trim`), the raw text is put back; if it truly rewrites a turn (Qwen3 drops the thinking of old turns), the
   template wins.
3. The longest stored sequence whose text is a string prefix of the rendering gives the exact ids of that part; the rest is
   tokenised and appended. Every call offers three such sequences, its `Point`s: its prompt, its prompt with the response's
   body, and all of it with the id that ended the turn (the template continues behind "<|im_end|>" with a newline, or, where
   the answer was cut by length, with the "<|im_end|>" itself). After a stop string the body holds that string, as sampled.
4. Where that covers less than everything the model has said in this conversation, the call is a branch: `Plan.branch_reason`
   says why and `Plan.retokenized` counts the response tokens of earlier calls whose ids had to be derived from text again.

Pure logic without Ray, transformers or HTTP. Called by: the door. Test alone: `pytest tests/property/test_gateway_session.py`.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agl_ray.gateway.calls import (
    Call,
    MessageKey,
    Point,
    message_chain,
    message_key,
    short_hash,
    thoughts,
    tool_ids,
)
from agl_ray.gateway.render import TextModel

_MAX_COMBINATIONS = 8  # renderings tried where equal messages came from different raw texts


class BranchReason(StrEnum):
    """Why a call does not simply continue what the model has said."""

    NEW_CONVERSATION = "new_conversation"  # nothing that the model said before is in it
    SIBLING = "sibling"  # the same prompt was answered before
    END_TOKEN = "end_token"  # the turn ended with another id than the template puts there
    ECHO_DIFFERS = "echo_differs"  # the assistant message sent back is not the one returned
    TOOLS_CHANGED = "tools_changed"
    TEMPLATE = "template"  # the template rewrites the earlier turns
    HISTORY_CHANGED = "history_changed"  # the caller dropped or changed earlier messages
    OVERLONG = "overlong"  # the gateway took a part out of its middle (overlong.py)


@dataclass(frozen=True)
class Plan:
    """How a request is to be sent: N prompt ids, of which the first `parent_tokens` are those of `parent` up to `point`."""

    parent: Call | None
    point: Point | None
    rest_text: str
    rest_ids: array[int]
    prompt_ids: list[int]
    retokenized: int
    branch_reason: BranchReason | None
    num_messages: int
    shared_messages: int  # leading messages equal to those of the parent's request
    chain: str
    tools: str
    before: tuple[Call, ...] = ()  # as in `Call`

    @property
    def parent_tokens(self) -> int:
        return len(self.prompt_ids) - len(self.rest_ids)


@dataclass(frozen=True)
class Match:
    """A stored sequence that a prompt starts with."""

    call: Call
    point: Point
    length: int  # characters

    def said(self) -> list[Call]:
        return self.call.said(self.point)


def _lost(chosen: dict[int, Call], match: Match | None) -> list[Call]:
    """The calls among `chosen` whose words are not in the matched sequence. Equal words of another branch count as there."""
    there = Counter((call.key, call.body_text) for call in match.said()) if match else Counter()
    lost = []
    for _, call in sorted(chosen.items()):
        words = (call.key, call.body_text)
        if there[words]:
            there[words] -= 1
        else:
            lost.append(call)
    return lost


@dataclass
class Session:
    """The calls of one attempt and role, in order. Not safe for threads; `plan` and `add` never await."""

    calls: list[Call] = field(default_factory=list)
    _by_id: dict[str, Call] = field(default_factory=dict)
    _children: dict[str, list[Call]] = field(default_factory=dict)
    roots: list[Call] = field(default_factory=list)
    _by_key: dict[MessageKey, list[Call]] = field(default_factory=dict)

    def plan(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        text_model: TextModel,
    ) -> Plan:
        """The ids to send for this conversation. Errors of the template (Refusal) pass through."""
        chains = message_chain(messages)
        tools_hash = short_hash(tools) if tools else ""
        text, match, chosen = self._place(messages, tools, text_model)
        lost = _lost(chosen, match)
        rest = text[match.length :] if match else text
        reason, edited = self._reason(match, rest, lost, chosen, tools_hash, chains, messages)
        after = match.call.end_text if match and match.point is Point.FULL else ""
        rest_ids = array("i", text_model.encode(rest, after))
        shared = 0
        if match:
            count = match.call.num_messages
            shared = count if count <= len(messages) and chains[count] == match.call.chain else 0
        return Plan(
            parent=match.call if match else None,
            point=match.point if match else None,
            rest_text=rest,
            rest_ids=rest_ids,
            prompt_ids=[*(match.call.ids(match.point) if match else []), *rest_ids],
            retokenized=sum(len(call.response_ids) for call in lost) + edited,
            branch_reason=reason,
            num_messages=len(messages),
            shared_messages=shared,
            chain=chains[-1],
            tools=tools_hash,
        )

    def add(
        self,
        plan: Plan,
        call_id: str,
        response_ids: list[int],
        body_text: str,
        end_text: str,
        message: dict[str, Any],
    ) -> Call:
        """Remember a finished call: what the model wrote and the message that was returned for it."""
        call = Call(
            call_id=call_id,
            parent=plan.parent,
            point=plan.point,
            rest_text=plan.rest_text,
            rest_ids=plan.rest_ids,
            body_text=body_text,
            end_text=end_text,
            response_ids=array("i", response_ids),
            key=message_key(message),
            tool_ids=tool_ids(message),
            reasoning=thoughts(message),
            num_messages=plan.num_messages,
            chain=plan.chain,
            tools=plan.tools,
            num_prompt_ids=len(plan.prompt_ids),
            before=plan.before,
        )
        self.remember(call)
        return call

    def known(self, call_id: str) -> Call:
        """ValueError where no such call is recorded."""
        if call_id not in self._by_id:
            raise ValueError(f"a call goes on from {call_id}, which is not recorded")
        return self._by_id[call_id]

    def children(self, call: Call) -> list[Call]:
        """The calls that continue this one, oldest first."""
        return self._children.get(call.call_id, [])

    def remember(self, call: Call) -> None:
        """Put a call (a new one, or one read back from the store) into the tree."""
        self.calls.append(call)
        self._by_id[call.call_id] = call
        siblings = self._children.setdefault(call.parent.call_id, []) if call.parent else self.roots
        siblings.append(call)
        self._by_key.setdefault(call.key, []).append(call)

    # ---- finding the place ----

    def _place(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        text_model: TextModel,
    ) -> tuple[str, Match | None, dict[int, Call]]:
        """The rendering, its longest stored prefix, and the call taken for each assistant message (by index)."""
        best: tuple[str, Match | None, dict[int, Call]] | None = None
        for chosen in self._assignments(messages):
            for text in _renderings(messages, tools, chosen, text_model):
                match = self.longest(text, chosen)
                length = match.length if match else -1
                if best is None or length > (best[1].length if best[1] else -1):
                    best = (text, match, chosen)
                if not _lost(chosen, match):
                    return text, match, chosen
        if best is None:
            raise AssertionError("a conversation has at least one rendering")
        return best

    def _assignments(self, messages: list[dict[str, Any]]) -> Iterator[dict[int, Call]]:
        """Which calls the assistant messages may stand for; the likeliest first. Raw text decides, so one call per text."""
        slots: list[list[tuple[int, Call]]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            found = self._by_key.get(message_key(message), [])
            if said := thoughts(message):
                found = [call for call in found if call.reasoning == said]
            given_ids = tool_ids(message)
            newest_first = found[::-1]
            ranked = sorted(newest_first, key=lambda call: call.tool_ids != given_ids)
            texts = {call.body_text: call for call in reversed(ranked)}
            options = [call for call in ranked if texts[call.body_text] is call]
            if options:
                slots.append([(index, call) for call in options])
        for combination in itertools.islice(itertools.product(*slots), _MAX_COMBINATIONS):
            yield dict(combination)

    def longest(self, text: str, chosen: dict[int, Call]) -> Match | None:
        """The longest stored sequence that `text` starts with. Equally long ones differ in ids only: the one with more of
        the `chosen` calls wins, then the newer."""
        found: list[Match] = []
        stack = [(call, 0) for call in self.roots]
        while stack:
            call, start = stack.pop()
            if not text.startswith(call.rest_text, start):
                continue
            ends = _ends(call, text, start + len(call.rest_text))
            for point, length in ends.items():
                if not found or length > found[0].length:
                    found = [Match(call, point, length)]
                elif length == found[0].length:
                    found.append(Match(call, point, length))
            for child in self.children(call):
                if child.point in ends:
                    stack.append((child, ends[child.point]))
        if len(found) < 2:
            return found[0] if found else None
        wanted = {call.call_id for call in chosen.values()}
        age = {call.call_id: number for number, call in enumerate(self.calls)}
        return max(
            found,
            key=lambda match: (
                sum(call.call_id in wanted for call in match.said()),
                age[match.call.call_id],
            ),
        )

    def _reason(
        self,
        match: Match | None,
        rest: str,
        lost: list[Call],
        chosen: dict[int, Call],
        tools_hash: str,
        chains: list[str],
        messages: list[dict[str, Any]],
    ) -> tuple[BranchReason | None, int]:
        """Why this is a branch (None: it is none), and the tokens of a response that came back edited."""
        if not self.calls:
            return None, 0
        if lost:
            if all(call.tools != tools_hash for call in lost):
                return BranchReason.TOOLS_CHANGED, 0
            intact = any(
                call.num_messages <= len(messages) and chains[call.num_messages] == call.chain
                for call in lost
            )
            return (BranchReason.TEMPLATE if intact else BranchReason.HISTORY_CHANGED), 0
        if match is None:
            return BranchReason.NEW_CONVERSATION, 0
        if match.point is Point.FULL:
            return None, 0
        if match.point is Point.BODY:
            return BranchReason.END_TOKEN, 0
        at = match.call.num_messages
        edited = at < len(messages) and messages[at]["role"] == "assistant" and at not in chosen
        if rest and edited:
            return BranchReason.ECHO_DIFFERS, len(match.call.response_ids)
        return BranchReason.SIBLING, 0


def _ends(call: Call, text: str, prompt: int) -> dict[Point, int]:
    """The points of `call` that `text` reaches, with their lengths; `prompt` characters are known to match."""
    ends = {Point.PROMPT: prompt}
    if text.startswith(call.body_text, prompt):
        body = prompt + len(call.body_text)
        if call.body_text:
            ends[Point.BODY] = body
        if text.startswith(call.end_text, body) and (call.body_text or call.end_text):
            ends[Point.FULL] = body + len(call.end_text)
            if not call.end_text:
                del ends[Point.BODY]  # the same place
    return ends


def _renderings(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    chosen: dict[int, Call],
    text_model: TextModel,
) -> Iterator[str]:
    """The conversation with raw texts in place of returned messages; then, where it differs in white space only, with the
    raw texts spliced in untouched by the template."""

    def with_contents(contents: dict[int, str]) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "content": contents[index]} if index in contents else message
            for index, message in enumerate(messages)
        ]

    raw = {index: call.body_text for index, call in chosen.items()}
    plain = text_model.render(with_contents(raw), tools)
    yield plain
    if not raw or "\ue000" in plain:
        return
    marks = {
        index: f"\ue000{index}\ue001" for index in raw
    }  # private-use characters no template touches
    spliced = text_model.render(with_contents(marks), tools)
    for index, mark in marks.items():
        spliced = spliced.replace(mark, raw[index])
    if spliced != plain and "".join(spliced.split()) == "".join(plain.split()):
        yield spliced
