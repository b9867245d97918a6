"""Thoughts: vLLM's reasoning parsers, streams that agree with whole answers, every dialect's own field, histories with and without."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gateway_desk import Desk, calls, says
from gateway_fakes import FORGETTING_TEMPLATE, THINKING_TEMPLATE, save_model_folder

from agl_ray.gateway.reasoning import Split
from agl_ray.gateway.render import Renderer
from agl_ray.types import InputError

ASKED = [{"role": "user", "content": "1+1?"}]
THOUGHT = "<think>\none and one\n</think>\n\nIt is 2."
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model"), THINKING_TEMPLATE)


NEEDED = [name for name in ("ijson", "mistral_common") if find_spec(name) is None]
QWEN = pytest.param(
    "qwen3", marks=pytest.mark.skipif(bool(NEEDED), reason=f"vLLM's parser needs {NEEDED}")
)


@pytest.fixture(scope="module", params=["deepseek_r1", QWEN])
def renderer(folder: Path, request: pytest.FixtureRequest) -> Renderer:
    return Renderer(folder, "hermes", request.param)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASKED, **fields}


def test_a_parser_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"engine\.reasoning_parser: vLLM knows no parser 'nonsense'"
    ):
        Renderer(folder, None, "nonsense")
    bare = save_model_folder(tmp_path / "bare")
    tokenizer = (bare / "tokenizer.json").read_text().replace("<think>", "<thunk>")
    (bare / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(InputError, match=r"engine\.reasoning_parser: .* does not fit"):
        Renderer(bare, None, "deepseek_r1")
    if NEEDED:
        with pytest.raises(InputError, match=f"pip install {NEEDED[0]}"):
            Renderer(folder, None, "qwen3")


@pytest.mark.parametrize(
    "text",
    [
        THOUGHT,
        "no start</think>then this",
        "<think>cut in the mid",
        "<think></think>nothing thought",
        "<think>a < b </thin</think>\n",
        "  <think>\n x \n</think>  y ",
        "plain",
        "",
        f"<think>which tool?</think>\n\nWell. {calls('1+1')}",
        f"<think>perhaps {calls('1+1')} or not</think>\n\n{calls('2+2')}",
    ],
)
@pytest.mark.parametrize("tools", [False, True])
def test_a_stream_gives_the_message_of_a_whole_answer(
    renderer: Renderer, text: str, tools: bool
) -> None:
    desk = Desk(renderer, [says(renderer, text), says(renderer, text)])
    asked = chat(tools=[TOOL]) if tools else chat()
    whole = desk.post("v1/chat/completions", asked).json()["choices"][0]["message"]
    found = desk.events("v1/chat/completions", asked)
    deltas = [event["choices"][0]["delta"] for event in found[:-1]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == (
        whole.get("reasoning_content") or ""
    )
    assert "".join(d.get("content", "") for d in deltas) == (whole["content"] or "")
    names = [call["function"]["arguments"] for d in deltas for call in d.get("tool_calls", [])]
    assert names == [call["function"]["arguments"] for call in whole.get("tool_calls", [])]


def test_a_stream_runs_ahead_with_thoughts(renderer: Renderer) -> None:
    assert renderer.thoughts is not None
    split = Split(renderer.thoughts, over=False)
    seen = []
    for size in range(1, len(THOUGHT) + 1):
        split.push(THOUGHT[:size], size)
        seen.append((split.reasoning, split.content_at is not None))
    assert ("one and", False) in seen
    assert ("one and one", True) in seen
    assert all("<" not in reasoning for reasoning, _ in seen)


def test_every_dialect_has_its_field(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, THOUGHT) for _ in range(8)])
    said = desk.post("v1/chat/completions", chat()).json()
    message = said["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "one and one"
    assert message["content"] == "It is 2."
    counted = said["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < counted < said["usage"]["completion_tokens"]

    asked = chat(max_tokens=50)
    thinking, text = desk.post("v1/messages", asked).json()["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "one and one")
    assert thinking["signature"]
    assert text == {"type": "text", "text": "It is 2."}
    found = desk.events("v1/messages", asked)
    blocks = [e["content_block"]["type"] for e in found if e["type"] == "content_block_start"]
    assert blocks == ["thinking", "text"]
    kinds = [e["delta"]["type"] for e in found if e["type"] == "content_block_delta"]
    assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta"]

    made = desk.post("v1/responses", {"model": "tiny", "input": "1+1?"}).json()
    item, answer = made["output"]
    assert (item["type"], item["summary"]) == ("reasoning", [])
    assert item["content"] == [{"type": "reasoning_text", "text": "one and one"}]
    assert answer["content"][0]["text"] == "It is 2."
    assert made["usage"]["output_tokens_details"]["reasoning_tokens"] == counted
    found = desk.events("v1/responses", {"model": "tiny", "input": "1+1?"})
    kinds = list(dict.fromkeys(e["type"].removeprefix("response.") for e in found))
    assert kinds.index("reasoning_text.delta") < kinds.index("reasoning_text.done")
    assert kinds.index("reasoning_text.done") < kinds.index("output_text.delta")
    assert [e["item"]["type"] for e in found if e["type"] == "response.output_item.done"] == [
        "reasoning",
        "message",
    ]

    raw = desk.post("v1/completions", {"model": "tiny", "prompt": "1+1?"}).json()
    assert raw["choices"][0]["text"] == THOUGHT


@pytest.mark.parametrize("sent_back", ["reasoning_content", "reasoning", "blocks", "items", None])
def test_a_history_with_or_without_thoughts_keeps_its_ids(
    renderer: Renderer, sent_back: str | None
) -> None:
    desk = Desk(renderer, [says(renderer, THOUGHT), says(renderer, "ok")])
    desk.post("v1/chat/completions", chat())
    answer = {"role": "assistant", "content": "It is 2."}
    then = {"role": "user", "content": "Sure?"}
    if sent_back == "blocks":
        blocks = [
            {"type": "thinking", "thinking": "one and one", "signature": "s"},
            {"type": "text", "text": "It is 2."},
        ]
        turns = [*ASKED, {"role": "assistant", "content": blocks}, then]
        found = desk.post("v1/messages", chat(messages=turns, max_tokens=50))
    elif sent_back == "items":
        thought = {"type": "reasoning_text", "text": "one and one"}
        item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [thought]}
        found = desk.post("v1/responses", {"model": "tiny", "input": [*ASKED, item, answer, then]})
    else:
        if sent_back is not None:
            answer[sent_back] = "one and one"
        found = desk.post("v1/chat/completions", chat(messages=[*ASKED, answer, then]))
    assert found.status_code == 200, found.text
    first, second = desk.rows
    assert second["parent_call"] == first["span_id"]
    assert second["attributes"]["agl.retokenized_tokens"] == 0
    assert "agl.branch_reason" not in second["attributes"]


def test_edited_thoughts_are_the_callers_own(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, THOUGHT), says(renderer, "ok")])
    desk.post("v1/chat/completions", chat())
    answer = {"role": "assistant", "content": "It is 2.", "reasoning_content": "I guess"}
    turns = [*ASKED, answer, {"role": "user", "content": "Sure?"}]
    desk.post("v1/chat/completions", chat(messages=turns))
    second = desk.rows[1]["attributes"]
    assert second["agl.branch_reason"] == "echo_differs"
    assert second["agl.retokenized_tokens"] == len(desk.rows[0]["response_ids"])


def test_a_template_that_forgets_thoughts_makes_a_branch_with_its_reason(tmp_path: Path) -> None:
    forgetful = Renderer(
        save_model_folder(tmp_path / "m", FORGETTING_TEMPLATE), None, "deepseek_r1"
    )
    desk = Desk(forgetful, [says(forgetful, THOUGHT), says(forgetful, "ok")])
    desk.post("v1/chat/completions", chat())
    answer = {"role": "assistant", "content": "It is 2."}
    turns = [*ASKED, answer, {"role": "user", "content": "Sure?"}]
    desk.post("v1/chat/completions", chat(messages=turns))
    second = desk.rows[1]["attributes"]
    assert second["agl.branch_reason"] == "template"
    assert second["agl.retokenized_tokens"] == len(desk.rows[0]["response_ids"])


def test_thinking_is_switched_by_the_templates_option(renderer: Renderer) -> None:
    off = "<think>\n\n</think>\n\n"
    desk = Desk(renderer, [says(renderer, "It is 2.") for _ in range(6)])
    bodies = [
        ("v1/messages", chat(max_tokens=50, thinking={"type": "disabled"})),
        ("v1/chat/completions", chat(chat_template_kwargs={"enable_thinking": False})),
    ]
    for action, asked in bodies:
        made = desk.post(action, asked).json()
        assert desk.prompt().endswith(off)
        assert "It is 2." in str(made)
        assert "reasoning_content" not in str(made)
        found = [
            event.get("delta") or event.get("choices") for event in desk.events(action, asked)[:-2]
        ]
        assert "thinking" not in str(found)
        assert "reasoning" not in str(found)
    assert desk.rows[0]["attributes"]["request"]["template"] == {"thinking": False}
    asked = chat(max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    assert desk.post("v1/messages", asked).status_code == 200
    assert not desk.prompt().endswith(off)
    assert desk.rows[-1]["attributes"]["request"]["metadata"] == {"thinking_budget_tokens": 1024}


@pytest.mark.parametrize("option", ["documents", "messages", "tokenize", "eos_token", "mood"])
def test_options_that_the_template_does_not_know_are_refused(
    renderer: Renderer, option: str
) -> None:
    answer = Desk(renderer, []).post("v1/chat/completions", chat(chat_template_kwargs={option: 1}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == option


def test_without_a_parser_thoughts_are_text(folder: Path) -> None:
    plain = Renderer(folder, "hermes")
    desk = Desk(plain, [says(plain, THOUGHT)])
    message = desk.post("v1/chat/completions", chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": THOUGHT}
