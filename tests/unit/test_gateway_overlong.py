"""Prompts that leave no room: what is cut, what stays, and that the following calls go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gateway_desk import Desk, calls, says
from gateway_fakes import OPENING_TEMPLATE, TEMPLATE, TOOL, TinyText, save_model_folder

from agl_ray.gateway.overlong import answer_mark
from agl_ray.gateway.render import Renderer
from agl_ray.trajectory.rows import build_rows

CHAT = "v1/chat/completions"
HEAD = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "FIRST"}]
LONGEST = 240


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = save_model_folder(tmp_path_factory.mktemp("opening"), OPENING_TEMPLATE)
    return Renderer(folder, "hermes")


def desk(renderer: Renderer, policy: str, **options: Any) -> Desk:
    number = iter(range(1000))
    script = lambda request: says(renderer, f"answer {next(number)}.")  # noqa: E731
    return Desk(renderer, script, overlong=policy, max_model_len=LONGEST, **options)


def talk(one: Desk, turns: int) -> list[dict[str, Any]]:
    """A chat of so many turns, whose caller sends its whole history; the spans."""
    messages = list(HEAD)
    for turn in range(turns):
        answer = one.post(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 20})
        assert answer.status_code == 200, (turn, answer.text)
        messages += [
            answer.json()["choices"][0]["message"],
            {"role": "user", "content": f"turn {turn} " + "xyz " * 3},
        ]
    return one.rows


def test_error_refuses_and_records_once(renderer: Renderer) -> None:
    one = desk(renderer, "error")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 400}]}
    for _ in range(3):
        found = one.post(CHAT, asked)
        assert (found.status_code, found.json()["error"]["code"]) == (
            400,
            "context_length_exceeded",
        )
    assert [row["name"] for row in one.rows] == ["model.call.refused"]
    assert one.rows[0]["status_message"].startswith("context_length_exceeded: ")


@pytest.mark.parametrize("policy", ["drop-oldest-turns", "truncate-middle"])
def test_a_long_chat_goes_on(renderer: Renderer, policy: str) -> None:
    one = desk(renderer, policy)
    rows = talk(one, 14)
    cut = [row for row in rows if "agl.overlong" in row["attributes"]]
    exact = [row for row in rows[1:] if "agl.branch_reason" not in row["attributes"]]
    assert len(cut) >= 2
    # Between two cuts calls continue each other, id for id.
    assert len(cut) + len(exact) == len(rows) - 1
    assert len(exact) > len(cut)
    assert {row["attributes"]["agl.retokenized_tokens"] for row in rows} == {0}
    for row in cut:
        noted = row["attributes"]["agl.overlong"]
        assert row["attributes"]["agl.branch_reason"] == "overlong"
        assert (noted["policy"], row["parent_call"]) == (policy, None)
        removed = noted["cut"][1] - noted["cut"][0]
        assert noted["prompt_tokens"] - removed == row["prompt_tokens"]
    for request in one.engine.requests:
        assert len(request.prompt_ids) + 20 <= LONGEST
        text = renderer.decode(request.prompt_ids)
        assert text.startswith(renderer.render(HEAD, None))
        assert text.endswith("<|im_start|>assistant\n")
    last = renderer.decode(one.engine.requests[-1].prompt_ids)
    assert "turn 12 " in last
    assert "turn 0 " not in last
    state = {row["span_id"]: row for row in rows}
    for row in exact:
        parent = state[row["parent_call"]]
        assert row["parent_tokens"] == parent["prompt_tokens"] + parent["response_tokens"]


def test_dropped_turns_are_whole(renderer: Renderer) -> None:
    one = desk(renderer, "drop-oldest-turns")
    rows = talk(one, 9)
    index = next(i for i, row in enumerate(rows) if "agl.overlong" in row["attributes"])
    text = one.prompt(index)
    head = renderer.render(HEAD, None)
    turns = text[len(head) :].split("<|im_end|>\n<|im_start|>assistant\n")[:-1]
    numbers = [int(turn.partition("answer ")[2].partition(".")[0]) for turn in turns]
    assert numbers == list(range(numbers[0], index))
    assert all(turn.startswith("answer ") and "user\nturn" in turn for turn in turns)


def test_a_tools_result_goes_with_its_call(renderer: Renderer) -> None:
    script = [says(renderer, calls(str(n))) for n in range(20)]
    one = Desk(renderer, script, overlong="drop-oldest-turns", max_model_len=400)
    messages = list(HEAD)
    for turn in range(10):
        asked = {"model": "tiny", "messages": messages, "max_tokens": 40, "tools": [TOOL]}
        answer = one.post(CHAT, asked).json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"]}
        messages += [answer, {**result, "content": f"result {turn}"}]
    text = one.prompt()
    assert any("agl.overlong" in row["attributes"] for row in one.rows)
    assert text.count("<tool_call>") == text.count("<tool_response>") > 0


def test_the_head_is_never_cut(renderer: Renderer) -> None:
    for policy in ("drop-oldest-turns", "truncate-middle"):
        one = desk(renderer, policy)
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 400}]}
        assert one.post(CHAT, asked).json()["error"]["code"] == "context_length_exceeded"


def test_raw_prompts_lose_their_middle(renderer: Renderer) -> None:
    one = desk(renderer, "truncate-middle")
    prompt = "start " + "word " * 300 + "end"
    for asked in (prompt, renderer.encode(prompt)):
        found = one.post("v1/completions", {"model": "tiny", "prompt": asked, "max_tokens": 20})
        assert found.status_code == 200, found.text
        text = one.prompt()
        assert text.startswith("start ")
        assert text.endswith("end")
        assert len(one.engine.requests[-1].prompt_ids) + 20 <= LONGEST
    dropped = desk(renderer, "drop-oldest-turns")
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 20}
    assert dropped.post("v1/completions", asked).status_code == 400


def test_a_cut_session_survives_a_restart_and_makes_rows(renderer: Renderer) -> None:
    import pyarrow as pa

    one = desk(renderer, "drop-oldest-turns", mode="train")
    messages = list(HEAD)
    for turn in range(12):
        found = one.post(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 20})
        answer = found.json()["choices"][0]["message"]
        messages += [answer, {"role": "user", "content": f"turn {turn} " + "xyz " * 3}]
        one.restart()
    assert {row["attributes"]["agl.retokenized_tokens"] for row in one.rows} == {0}
    built = build_rows(pa.Table.from_batches(one.store.batches), [("ro-1", "at-1")])
    made = sum(row["response_tokens"] for row in one.rows)
    assert built.rows.weights.sum() == made  # every sampled token is trained once
    cuts = sum("agl.overlong" in row["attributes"] for row in one.rows)
    assert len(built.rows.lengths) == cuts + 1


def test_the_mark_of_an_answer(renderer: Renderer) -> None:
    assert renderer.decode(answer_mark(renderer)) == "<|im_end|>\n<|im_start|>assistant\n"


def mark_of(template: str) -> str:
    text = TinyText(template)
    return text.decode(list(answer_mark(text)))


def test_the_mark_is_what_past_answers_have_before_them_too() -> None:
    assert mark_of(TEMPLATE) == "<|im_end|>\n<|im_start|>assistant\n"
    assert mark_of(OPENING_TEMPLATE) == "<|im_end|>\n<|im_start|>assistant\n"
    closed = TEMPLATE.replace("assistant\n' -}}{%- endif", "assistant\n<think>\n\n' -}}{%- endif")
    assert mark_of(closed) == "<|im_end|>\n<|im_start|>assistant\n"


def test_what_stands_elsewhere_too_is_no_mark() -> None:
    """An answer's opening that no past answer has: the end of a message, which is left of it, is no answer's."""
    other = TEMPLATE.replace(
        "{{- '<|im_start|>assistant\n' -}}{%- endif -%}", "{{- '<think>\n' -}}{%- endif -%}"
    )
    assert mark_of(other) == "<|im_end|>\n<think>\n"
    silent = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert mark_of(silent) == ""
    without = TEMPLATE.partition("{%- if add_generation_prompt")[0]
    assert mark_of(without) == "<|im_end|>\n"


@pytest.mark.parametrize("policy", ["drop-oldest-turns", "truncate-middle"])
def test_a_prompt_that_opens_the_thoughts_is_cut_too(opening: Renderer, policy: str) -> None:
    number = iter(range(1000))
    script = lambda request: says(opening, f"hm</think>answer {next(number)}.")  # noqa: E731
    one = Desk(opening, script, overlong=policy, max_model_len=LONGEST)
    rows = talk(one, 14)
    assert sum("agl.overlong" in row["attributes"] for row in rows) >= 2
    for request in one.engine.requests:
        assert len(request.prompt_ids) + 20 <= LONGEST
        text = opening.decode(request.prompt_ids)
        assert text.startswith(opening.render(HEAD, None).removesuffix("<think>\n"))
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
        assert text.count("<think>") == 1
    last = opening.decode(one.engine.requests[-1].prompt_ids)
    assert "turn 12 " in last
    assert "turn 0 " not in last
    if policy == "drop-oldest-turns":
        turns = last.split("<|im_end|>\n<|im_start|>assistant\n")[1:-1]
        assert all(turn.startswith("answer ") and "user\nturn" in turn for turn in turns)


@pytest.mark.parametrize("policy", ["drop-oldest-turns", "truncate-middle"])
def test_the_end_that_asks_for_the_answer_is_never_cut(tmp_path: Path, policy: str) -> None:
    opening = "assistant\n<think>\nLet me think about that step by step."
    template = TEMPLATE.replace("assistant\n' -}}{%- endif", f"{opening}' -}}}}{{%- endif")
    renderer = Renderer(save_model_folder(tmp_path, template))
    one = Desk(renderer, lambda request: says(renderer, "yes"), overlong=policy, max_model_len=100)
    for words in range(1, 60):
        asked = [{"role": "user", "content": "word " * words}]
        sent = renderer.encode(renderer.render(asked, None))
        found = one.post(CHAT, {"model": "tiny", "messages": asked, "max_tokens": 20})
        if found.status_code == 200:
            assert one.engine.requests[-1].prompt_ids == sent
        else:
            assert found.json()["error"]["code"] == "context_length_exceeded"
            assert len(sent) >= 100
    assert 5 < len(one.engine.requests) < 50
