"""Sessions: whatever the model samples, a faithful agent's conversation goes on with exactly the ids that were sampled."""

from __future__ import annotations

from functools import cache
from typing import Any

from gateway_fakes import (
    END,
    FORGETTING_TEMPLATE,
    TEMPLATE,
    TOOL,
    TRIMMING_TEMPLATE,
    TinyText,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_ray.gateway.calls import Point
from agl_ray.gateway.session import BranchReason, Plan, Session


@cache
def text_model(template: str = TEMPLATE) -> TinyText:
    return TinyText(template)


ORDINARY = st.integers(
    3, text_model().tokenizer.get_vocab_size() - 1
)  # anything but the three special tokens
RESPONSES = st.lists(ORDINARY, min_size=0, max_size=12)


def answer(
    session: Session,
    plan: Plan,
    ids: list[int],
    *,
    ended: bool = True,
    tool_calls: list[dict[str, Any]] | None = None,
    template: str = TEMPLATE,
) -> dict[str, Any]:
    """Record a response of the model; the message returned for it."""
    model = text_model(template)
    body = model.decode(ids)
    message: dict[str, Any] = {"role": "assistant", "content": body}
    if tool_calls:
        message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
    response = [*ids, model.end_id] if ended else ids
    session.add(plan, f"call-{len(session.calls)}", response, body, END if ended else "", message)
    return message


def tool_message(call_id: str, name: str, arguments: str) -> list[dict[str, Any]]:
    return [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@given(st.lists(st.tuples(RESPONSES, st.booleans(), st.text(max_size=12)), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_a_faithful_conversation_keeps_every_sampled_id(
    turns: list[tuple[list[int], bool, str]],
) -> None:
    """Non-canonical ids, characters cut in the middle, answers cut by length: the next prompt starts with all of it."""
    session, model = Session(), text_model()
    messages = [user("what is 1+1?")]
    sequence: list[int] = []
    for number, (ids, ended, reply) in enumerate(turns):
        if not ids and not ended:
            ended = True  # a response has at least one id
        plan = session.plan(messages, None, model)
        assert plan.prompt_ids[: len(sequence)] == sequence
        assert plan.retokenized == 0
        assert plan.branch_reason is None
        assert plan.parent_tokens == len(sequence)
        assert (plan.parent is None) == (number == 0)
        sequence = [*plan.prompt_ids, *ids, *([model.end_id] if ended else [])]
        message = answer(session, plan, ids, ended=ended)
        assert session.calls[-1].ids(Point.FULL) == sequence
        messages = [*messages, message, user(reply)]


@given(RESPONSES, st.sampled_from(["  ", "\n", "\n\n ", ""]), st.sampled_from([" ", "\n", ""]))
@settings(max_examples=60, deadline=None)
def test_a_template_that_trims_does_not_retokenize(ids: list[int], before: str, after: str) -> None:
    model = text_model(TRIMMING_TEMPLATE)
    ids = [*model.encode(before), *ids, *model.encode(after)]
    session = Session()
    plan = session.plan([user("a")], None, model)
    message = answer(session, plan, ids, template=TRIMMING_TEMPLATE)
    again = session.plan([user("a"), message, user("b")], None, model)
    assert (again.retokenized, again.branch_reason) == (0, None)
    assert again.prompt_ids[: again.parent_tokens] == [*plan.prompt_ids, *ids, model.end_id]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_branches_share_what_they_share(data: st.DataObject) -> None:
    """A random walk over conversations: go on, ask again, go back. Every prompt decodes to its rendering, and nothing is
    ever retokenized as long as messages come back as they were given."""
    session, model = Session(), text_model()
    histories: list[list[dict[str, Any]]] = [[user("start")]]
    for _ in range(data.draw(st.integers(2, 7))):
        history = data.draw(st.sampled_from(histories))
        plan = session.plan(history, None, model)
        assert plan.retokenized == 0
        if plan.parent is not None and plan.point is not None:
            assert plan.prompt_ids[: plan.parent_tokens] == plan.parent.ids(plan.point)
            assert plan.parent_tokens == plan.parent.num_ids(plan.point)
        ids = data.draw(RESPONSES)
        message = answer(session, plan, ids)
        histories.append([*history, message, user(data.draw(st.text(max_size=5)))])


def test_a_tool_call_comes_back_with_other_json_and_keeps_its_ids() -> None:
    session, model = Session(), text_model()
    first = [{"role": "system", "content": "You are a calculator agent."}, user("47+385?")]
    plan = session.plan(first, [TOOL], model)
    raw = '<tool_call>\n{"arguments":{"expression":"47+385"},   "name":"calculator"}\n</tool_call>'
    ids = [
        token for piece in raw for token in model.encode(piece)
    ]  # one id per character: nothing canonical
    assert ids != model.encode(raw)
    given_arguments = '{"expression": "47+385"}'
    answer(session, plan, ids, tool_calls=tool_message("call_1", "calculator", given_arguments))
    echoed = {
        "role": "assistant",
        "content": "",
        "tool_calls": tool_message("call_1", "calculator", {"expression": "47+385"}),  # type: ignore[arg-type]
    }
    tool = {"role": "tool", "tool_call_id": "call_1", "content": "432"}
    again = session.plan([*first, echoed, tool], [TOOL], model)
    assert (again.retokenized, again.branch_reason) == (0, None)
    assert again.prompt_ids[: again.parent_tokens] == [*plan.prompt_ids, *ids, model.end_id]
    assert "<tool_response>\n432\n</tool_response>" in model.decode(again.prompt_ids)


def test_two_calls_with_the_same_words_are_told_apart_by_their_tool_call_ids() -> None:
    session, model = Session(), text_model()
    raw = '<tool_call>\n{"name": "calculator", "arguments": {}}\n</tool_call>'
    variants = [model.encode(raw), [token for piece in raw for token in model.encode(piece)]]
    plans = []
    for number, ids in enumerate(variants):
        plan = session.plan([user("go")], [TOOL], model)
        plans.append(plan)
        answer(session, plan, ids, tool_calls=tool_message(f"call_{number}", "calculator", "{}"))
    assert plans[1].branch_reason is BranchReason.SIBLING
    for number, ids in enumerate(variants):
        echoed = {
            "role": "assistant",
            "content": None,
            "tool_calls": tool_message(f"call_{number}", "calculator", "{}"),
        }
        again = session.plan([user("go"), echoed, user("and?")], [TOOL], model)
        assert (again.retokenized, again.branch_reason) == (0, None)
        assert again.prompt_ids[: again.parent_tokens] == [*plans[0].prompt_ids, *ids, model.end_id]


def test_a_rewritten_history_is_a_branch_and_counted() -> None:
    session, model = Session(), text_model(FORGETTING_TEMPLATE)
    plan = session.plan([user("a")], None, model)
    ids = model.encode("hm hm</think>four")
    message = answer(session, plan, ids, template=FORGETTING_TEMPLATE)
    again = session.plan([user("a"), message, user("b")], None, model)
    assert again.branch_reason is BranchReason.TEMPLATE
    assert again.retokenized == len(ids) + 1
    assert "hm" not in model.decode(again.prompt_ids)
    assert again.prompt_ids[: again.parent_tokens] == plan.prompt_ids  # what can be kept is kept


def test_an_edited_answer_is_counted() -> None:
    session, model = Session(), text_model()
    plan = session.plan([user("a")], None, model)
    answer(session, plan, model.encode("The answer is 4."))
    edited = {"role": "assistant", "content": "Something else."}
    again = session.plan([user("a"), edited, user("b")], None, model)
    assert (again.branch_reason, again.point) == (BranchReason.ECHO_DIFFERS, Point.PROMPT)
    assert again.retokenized == len(session.calls[0].response_ids)


def test_reasons_of_other_branches() -> None:
    session, model = Session(), text_model()
    plan = session.plan([user("a")], None, model)
    message = answer(session, plan, model.encode("one"))
    turn_two = [user("a"), message, user("b")]
    two = answer(session, session.plan(turn_two, None, model), model.encode("two"))
    assert session.plan([user("z")], None, model).branch_reason is BranchReason.NEW_CONVERSATION
    assert session.plan([user("a")], None, model).branch_reason is BranchReason.SIBLING
    compacted = session.plan([user("summary"), two, user("c")], None, model)
    assert compacted.branch_reason is BranchReason.HISTORY_CHANGED
    assert compacted.retokenized == len(session.calls[1].response_ids)
    tools = session.plan([*turn_two, two, user("c")], [TOOL], model)
    assert tools.branch_reason is BranchReason.TOOLS_CHANGED
    assert tools.retokenized == sum(len(call.response_ids) for call in session.calls)


def test_another_end_of_turn_id_keeps_the_words() -> None:
    session, model = Session(), text_model()
    plan = session.plan([user("a")], None, model)
    ids = model.encode("done")
    end = model.tokenizer.token_to_id("<|endoftext|>")
    message = {"role": "assistant", "content": "done"}
    session.add(plan, "call-0", [*ids, end], "done", "<|endoftext|>", message)
    again = session.plan([user("a"), message, user("b")], None, model)
    assert (again.branch_reason, again.retokenized) == (BranchReason.END_TOKEN, 0)
    assert again.prompt_ids[: again.parent_tokens] == [*plan.prompt_ids, *ids]


def test_equal_words_in_another_conversation_do_not_mislead() -> None:
    session, model = Session(), text_model()
    one = session.plan([user("a")], None, model)
    spelled = [token for piece in "okay" for token in model.encode(piece)]
    message = answer(session, one, spelled)
    other = session.plan([user("other")], None, model)
    answer(session, other, model.encode("okay"))
    again = session.plan([user("a"), message, user("b")], None, model)
    assert (again.branch_reason, again.retokenized) == (None, 0)
    assert again.prompt_ids[: again.parent_tokens] == [*one.prompt_ids, *spelled, model.end_id]


def test_an_ordinary_turn_is_rendered_once() -> None:
    session, model = Session(), text_model()
    messages = [user("a")]
    for turn in range(4):
        before = model.renderings
        plan = session.plan(messages, None, model)
        assert model.renderings == before + 1
        messages = [*messages, answer(session, plan, model.encode(f"turn {turn}")), user("next")]
