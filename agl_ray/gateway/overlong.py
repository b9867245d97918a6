"""Prompts that leave no room for an answer: what `gateway.overlong` does about them, on the exact ids.

A range of ids is taken out of the planned prompt; nothing is tokenised anew. The head (all up to the first answer: the system message and
the first user message) is pinned.

    error               the call is refused
    drop-oldest-turns   whole turns, an answer with what followed it, oldest first; the last one stays
    truncate-middle     as many ids behind the head as are too many; of a raw prompt, out of its middle

Both cut to three quarters of what fits, so that the following calls go on exactly, instead of each being cut by one more turn. The session
remembers the cut ids under the text of the *uncut* conversation: the caller goes on with its whole history, which is that text and more,
and so its next call continues the cut sequence, id for id. A prompt that cannot be cut (a head as long as the context) is refused.

Called by: the door. Pure. Test alone: `pytest tests/unit/test_gateway_overlong.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from agl_ray.gateway.calls import Call, Point
from agl_ray.gateway.session import BranchReason, Plan

Overlong = Literal["error", "drop-oldest-turns", "truncate-middle"]
KEPT = 3 / 4  # of what fits


class Text(Protocol):
    """What is needed of a tokenizer and its chat template."""

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str: ...

    def encode(self, text: str, after: str = "") -> list[int]: ...


@dataclass(frozen=True)
class Cut:
    """What was taken out of a prompt of `prompt_tokens` ids: those from `start` to before `end`."""

    policy: Overlong
    prompt_tokens: int
    start: int
    end: int

    def noted(self) -> dict[str, Any]:
        """As the call's span records it."""
        cut = [self.start, self.end]
        return {"policy": self.policy, "prompt_tokens": self.prompt_tokens, "cut": cut}


def answer_mark(text: Text) -> tuple[int, ...]:
    """The ids that stand before every answer in this template's conversations: the common end of two prompts, as much of it as a past
    answer has before it too. Templates of models that think open the thoughts in the prompt (R1's "<think>") and forget them later."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}
    other = {"role": "user", "content": "b"}
    one, two, past = (
        text.encode(text.render(said, None)) for said in ([user], [other], [user, answer, other])
    )
    same = 0
    while same < min(len(one), len(two)) and one[-1 - same] == two[-1 - same]:
        same += 1
    asked = one[len(one) - same :]
    before = past[: len(past) - same]  # without the end that asks for the next answer
    for size in range(same, 0, -1):
        if len(_places(before, asked[:size])) == 1:
            return tuple(asked[:size])
    return tuple(asked)  # it is before no past answer: nothing can be cut


def fit(
    plan: Plan, policy: Overlong, longest: int, wanted: int | None, mark: Sequence[int]
) -> tuple[Plan, Cut | None]:
    """The plan, cut where its prompt is overlong and the policy can cut it.

    longest: ids of prompt and response; wanted: of the response; a quarter of `longest`, or all that is wanted where that is less, is kept
    free. mark: `answer_mark`; empty for a raw prompt.
    """
    fits = longest - max(1, min(longest // 4, wanted or longest))
    num_ids = len(plan.prompt_ids)
    if policy == "error" or num_ids <= fits:
        return plan, None
    place = _turns if policy == "drop-oldest-turns" else _middle
    found = place(plan.prompt_ids, mark, int(fits * KEPT), fits)
    if found is None:
        return plan, None
    start, end = found
    ids = [*plan.prompt_ids[:start], *plan.prompt_ids[end:]]
    shorter = replace(
        plan,
        parent=None,
        point=None,
        rest_text=_whole_text(plan),
        rest_ids=array("i", ids),
        prompt_ids=ids,
        branch_reason=BranchReason.OVERLONG,
        shared_messages=0,
        before=tuple(plan.parent.said(plan.point)) if plan.parent and plan.point else (),
    )
    return shorter, Cut(policy, num_ids, start, end)


def _turns(ids: list[int], mark: Sequence[int], target: int, fits: int) -> tuple[int, int] | None:
    """The fewest oldest turns whose loss brings the prompt to `target`, or else all but the last, where that fits."""
    starts = _places(ids, mark)
    if len(starts) < 3:
        return None
    head, *ends = starts[:-1]
    for end in ends:
        if len(ids) - (end - head) <= target:
            return head, end
    return (head, ends[-1]) if len(ids) - (ends[-1] - head) <= fits else None


def _middle(ids: list[int], mark: Sequence[int], target: int, fits: int) -> tuple[int, int] | None:
    """So many ids behind the head that `target` are left, or `fits` where the head is long. The prompt's end, which asks for the
    answer, stays."""
    starts = (_places(ids, mark) or [len(ids)]) if mark else [target // 2, len(ids)]
    head, end = starts[0], len(mark) + len(ids) - starts[-1]
    for size in (target, fits):
        if size - head > end and head < starts[-1]:
            return head, len(ids) - (size - head)
    return None


def _places(ids: list[int], mark: Sequence[int]) -> list[int]:
    """The places behind the mark: where answers start. The last one is that of the answer that is asked for."""
    if not mark:
        return []
    first, size, wanted = mark[0], len(mark), list(mark)
    return [
        at + size
        for at, token in enumerate(ids)
        if token == first and ids[at : at + size] == wanted
    ]


def _whole_text(plan: Plan) -> str:
    """The text of a plan's whole prompt, as the session knows it."""
    parts = [plan.rest_text]
    call: Call | None = plan.parent
    point = plan.point
    while call is not None:
        if point is Point.FULL:
            parts.append(call.end_text)
        if point is not Point.PROMPT:
            parts.append(call.body_text)
        parts.append(call.rest_text)
        point, call = call.point, call.parent
    return "".join(reversed(parts))
