"""Raw prompts (the completions dialect) in a token-exact session: text or ids that may go on from an earlier call.

There is no template here, so nothing is rewritten: the longest stored sequence that the prompt starts with gives the exact ids of
that part, and the rest is what the caller says it is (ids), or is tokenised (text). Raw prompts and conversations of one attempt
share one tree of calls. Called by: the door. Test alone: `pytest tests/unit/test_gateway_completions.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from agl_ray.gateway.calls import Call, Point, short_hash
from agl_ray.gateway.session import BranchReason, Match, Plan, Session


class RawText(Protocol):
    """What raw prompts need of a tokenizer."""

    raw_start: str
    """What stands before every raw prompt (a beginning-of-text token), or nothing."""

    def encode(self, text: str, after: str = "") -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def plan_raw(session: Session, prompt: str | list[int], text_model: RawText) -> Plan:
    """The ids to send for this prompt. Ids are sent as they are, and only looked up."""
    match: Match | None
    if isinstance(prompt, str):
        text = prompt if prompt.startswith(text_model.raw_start) else text_model.raw_start + prompt
        match = session.longest(text, {})
        rest_text = text[match.length :] if match else text
        after = match.call.end_text if match and match.point is Point.FULL else ""
        rest_ids = text_model.encode(rest_text, after)
    else:
        match = _longest_ids(session, array("i", prompt))
        rest_ids = prompt[match.call.num_ids(match.point) if match else 0 :]
        rest_text = text_model.decode(rest_ids)
    reason, retokenized = _reason(session, match, rest_text)
    return Plan(
        parent=match.call if match else None,
        point=match.point if match else None,
        rest_text=rest_text,
        rest_ids=array("i", rest_ids),
        prompt_ids=[*(match.call.ids(match.point) if match else []), *rest_ids],
        retokenized=retokenized,
        branch_reason=reason,
        num_messages=0,
        shared_messages=0,
        chain=short_hash(prompt),
        tools="",
    )


def _longest_ids(session: Session, prompt: array[int]) -> Match | None:
    """The longest stored sequence of ids that the prompt starts with; of equally long ones the newer. `length` is in ids."""
    age = {call.call_id: number for number, call in enumerate(session.calls)}
    best: Match | None = None
    stack = [(call, 0) for call in session.roots]
    while stack:
        call, start = stack.pop()
        for point in _reached(call, prompt, start):
            length = call.num_ids(point)
            if (
                best is None
                or length > best.length
                or (length == best.length and age[call.call_id] > age[best.call.call_id])
            ):
                best = Match(call, point, length)
            stack += [(child, length) for child in session.children(call) if child.point is point]
    return best


def _reached(call: Call, prompt: array[int], start: int) -> list[Point]:
    """The points of a call that the prompt reaches, if it is known to reach the call's first own id at `start`."""
    at = start + len(call.rest_ids)
    if prompt[start:at] != call.rest_ids:
        return []
    reached = [Point.PROMPT]
    body = call.response_ids[:-1] if call.end_text else call.response_ids
    if prompt[at : at + len(body)] != body:
        return reached
    if call.end_text and body:
        reached.append(Point.BODY)
    whole = prompt[at : at + len(call.response_ids)] == call.response_ids
    if call.response_ids and whole:
        reached.append(Point.FULL)
    return reached


def _reason(session: Session, match: Match | None, rest: str) -> tuple[BranchReason | None, int]:
    """Why this does not simply continue what was said, and the response tokens that came back as other ids."""
    if not session.calls:
        return None, 0
    if match is None:
        return BranchReason.NEW_CONVERSATION, 0
    if match.point is Point.FULL:
        return None, 0
    if match.point is Point.BODY:
        return BranchReason.END_TOKEN, 0
    said = match.call.key[0]
    if said and rest.lstrip().startswith(said):
        return BranchReason.ECHO_DIFFERS, len(match.call.response_ids)
    return BranchReason.SIBLING, 0
