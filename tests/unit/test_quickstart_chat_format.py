"""The base model's template and tokenizer: what the model says survives parsing and rendering, token by token."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import task
from agent import SYSTEM_PROMPT, TOOLS
from chat_format import MARKUP, make_tokenizer
from lessons import called, correct, habit_rows, skill_rows

from agl_ray.learner.sft_rows import tokenize_conversation

tokenizer = functools.cache(make_tokenizer)
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "47+385"}}\n</tool_call>'
QUESTION = {"role": "user", "content": "what is forty-seven plus 385?"}
PROMPT = [{"role": "system", "content": SYSTEM_PROMPT}, QUESTION]


def render(messages: list[dict[str, Any]], generation: bool = True, tools: Any = TOOLS) -> str:
    text = tokenizer().apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=generation
    )
    return str(text)


def test_the_text_of_a_whole_conversation() -> None:
    question = task.Question(QUESTION["content"], "+", 47, 385)
    assert render([*PROMPT, *correct(question)], generation=False) == (
        "<|im_start|>system\nYou are a calculator agent. Tools: calculator<|im_end|>\n"
        "<|im_start|>user\nwhat is forty-seven plus 385?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n432\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nThe answer is 432.<|im_end|>\n"
    )


def test_arguments_as_text_and_as_an_object_render_alike() -> None:
    as_text = called("47+385")
    as_object = json.loads(json.dumps(as_text))
    as_object["tool_calls"][0]["function"]["arguments"] = {"expression": "47+385"}
    assert render([*PROMPT, as_text]) == render([*PROMPT, as_object])


def test_no_tools_no_system_and_two_tool_results() -> None:
    assert render([QUESTION], tools=None).startswith("<|im_start|>user\nwhat is")
    assert render([QUESTION]).startswith("<|im_start|>system\nTools: calculator<|im_end|>\n")
    results = [{"role": "tool", "tool_call_id": "x", "content": c} for c in "12"]
    assert render([*PROMPT, *results], generation=False).endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def test_conversations_are_short() -> None:
    rows = [tokenize_conversation(tokenizer(), row) for row in skill_rows(0, 200)]
    parts = [part for row in rows for part in row]
    assert len(parts) == len(rows)  # the template rewrites no earlier turn
    lengths = [len(part.ids) for part in parts]
    prompts = [part.weights.index(1.0) for part in parts]
    assert len(tokenizer()) < 500
    assert sum(prompts) / len(prompts) < 18
    assert sum(lengths) / len(lengths) < 50


def test_the_longest_conversation_fits_the_engine() -> None:
    """Three turns of 40 tokens with the widest results stay below engine.max_model_len (192)."""
    worst = {"role": "user", "content": "what is seventy-seven minus seventy-seven?"}
    result = {"role": "tool", "tool_call_id": "x", "content": "-" + "9" * 12}
    with_result = render([*PROMPT, called("1"), result])
    before = render([*PROMPT, called("1")], generation=False)
    count = [
        len(tokenizer()(text, add_special_tokens=False)["input_ids"])
        for text in (render([PROMPT[0], worst]), with_result[len(before) :])
    ]
    assert count[0] + 3 * 40 + 2 * (count[1] + 2) <= 192


def test_round_trip_and_markup() -> None:
    for text in ("ein Geraet, 12.5 %, \u00e9\u4f60\U0001f600\n\t", CALL, *MARKUP):
        ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert tokenizer().decode(ids) == text
        assert tokenizer().decode(ids, skip_special_tokens=True) == text


@functools.cache
def parse() -> Any:
    """vLLM's own `hermes` parser over our tokenizer: text -> (content, tool calls)."""
    pytest.importorskip("vllm")
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    parser = Hermes2ProToolParser(tokenizer())
    return lambda text: parser.extract_tool_calls(text, request=None)


def message_of(text: str) -> dict[str, Any]:
    found = parse()(text)
    calls = [call.model_dump() for call in found.tool_calls]
    return {"role": "assistant", "content": found.content, "tool_calls": calls}


def test_vllm_parses_what_the_lessons_teach() -> None:
    for row in habit_rows(0, 60):
        for said in (m for m in row["messages"] if m["role"] == "assistant"):
            text = render([*PROMPT, said], generation=False).removeprefix(render(PROMPT))
            text = text.removesuffix("<|im_end|>\n")
            ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
            got = parse()(tokenizer().decode(ids))
            wanted = [call["function"] for call in said.get("tool_calls", [])]
            assert [call.function.model_dump() for call in got.tool_calls] == wanted
            assert got.content == said["content"]


@pytest.mark.parametrize(
    "text", [CALL, f"Let me see. {CALL}", f"{CALL}\n{CALL}", "The answer is 7."]
)
def test_parsed_and_rendered_again_is_what_was_said(text: str) -> None:
    said = render([*PROMPT, message_of(text)], generation=False).removeprefix(render(PROMPT))
    assert said == f"{text}<|im_end|>\n"


@pytest.mark.parametrize("text", [CALL, f"so {CALL}", CALL[:-12], CALL[:-20], "<tool_call>", "hm"])
def test_the_sampler_reads_as_vllm_does(text: str) -> None:
    pytest.importorskip("torch")
    from sampler import parse_message

    found, ours = parse()(text), parse_message(text)
    assert ours["content"] == found.content
    functions = [call["function"] for call in ours.get("tool_calls", [])]
    assert functions == [call.function.model_dump() for call in found.tool_calls]
