"""Conversations to rows: the ids and the mask of inference, templates that rewrite the past, bad lines named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_learner_sft import ROWS, TEMPLATE, make_tokenizer, row

from agl_ray.learner.sft_rows import (
    end_ids,
    read_conversations,
    tokenize_conversation,
    tokenize_rows,
)
from agl_ray.types import InputError


def said(tokenizer: Any, part: Any) -> str:
    return str(tokenizer.decode([i for i, w in zip(part.ids, part.weights, strict=True) if w]))


def test_ids_and_mask_are_those_of_inference() -> None:
    tokenizer = make_tokenizer()
    (part,) = tokenize_conversation(tokenizer, row("ab", "cd", "e", "fg"))
    assert tokenizer.decode(part.ids) == (
        "<s>user:ab<e>\n<s>assistant:cd<e>\n<s>user:e<e>\n<s>assistant:fg<e>"
    )
    assert said(tokenizer, part) == "cd<e>fg<e>"  # end of turn included, the newline after it not
    prompt = tokenizer.apply_chat_template(
        row("ab")["messages"], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert part.ids[: len(prompt_ids)] == prompt_ids
    assert not any(part.weights[: len(prompt_ids)])


def test_what_follows_the_last_assistant_turn_is_left_out() -> None:
    tokenizer = make_tokenizer()
    (part,) = tokenize_conversation(tokenizer, row("ab", "cd", "ignored"))
    assert tokenizer.decode(part.ids) == "<s>user:ab<e>\n<s>assistant:cd<e>"


def test_a_message_of_weight_0_is_context() -> None:
    tokenizer = make_tokenizer()
    conversation = row("ab", "cd", "e", "fg")
    conversation["messages"][1]["weight"] = 0
    (part,) = tokenize_conversation(tokenizer, conversation)
    assert said(tokenizer, part) == "fg<e>"
    conversation["messages"][3]["weight"] = 0.5
    with pytest.raises(InputError, match=r"row, message 3: expected weight 0 or 1, got 0\.5"):
        tokenize_conversation(tokenizer, conversation)


def test_a_template_that_rewrites_the_past_makes_a_row_of_each_turn() -> None:
    """As Qwen3's does with thoughts: each turn is learned once, behind what inference would show before it."""
    forgetful = TEMPLATE.replace(
        "m.content }}", "m.content if m.role == 'user' or loop.last else '' }}"
    )
    tokenizer = make_tokenizer(forgetful)
    parts = tokenize_conversation(tokenizer, row("a", "b", "cc", "dddd"))
    assert [said(tokenizer, part) for part in parts] == ["b<e>", "dddd<e>"]
    assert [tokenizer.decode(part.ids) for part in parts] == [
        "<s>user:a<e>\n<s>assistant:b<e>",
        "<s>user:a<e>\n<s>assistant:<e>\n<s>user:cc<e>\n<s>assistant:dddd<e>",
    ]


def test_a_template_whose_turns_cannot_be_told_is_refused() -> None:
    other_prompt = TEMPLATE.replace("<s>assistant:{%- endif", "<s>assistant: think{%- endif")
    with pytest.raises(InputError, match="differently from its own generation prompt"):
        tokenize_rows(make_tokenizer(other_prompt), [ROWS[0]])
    endless = TEMPLATE.replace("<e>", "")
    with pytest.raises(InputError, match=r"no end of turn after assistant message 1.*\['<e>'\]"):
        tokenize_rows(make_tokenizer(endless), [ROWS[0]])
    refusing = "{{ raise_exception('only users here') }}" + TEMPLATE
    with pytest.raises(InputError, match=r"SFT row 0: the chat template refuses.*only users here"):
        tokenize_rows(make_tokenizer(refusing), [ROWS[0]])
    with pytest.raises(InputError, match="expected a chat template"):
        tokenize_rows(make_tokenizer(template=None), ROWS)


def test_the_end_of_a_turn_may_be_named_by_the_models_folder(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE.replace("<e>", "<s>"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    ends = end_ids(tokenizer, tmp_path)
    (part,) = tokenize_conversation(tokenizer, row("ab", "cd"), ends=ends)
    assert said(tokenizer, part) == "cd<s>"


def test_arguments_of_tool_calls_reach_the_template_as_values() -> None:
    template = TEMPLATE.replace(
        "m.content }}",
        "m.content }}{%- for c in m.tool_calls or [] -%}{{ c.function.name }}{{ c.function.arguments.x }}{%- endfor -%}",
    )
    tokenizer = make_tokenizer(template)
    conversation = row("ab", "")
    conversation["messages"][1]["tool_calls"] = [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    ]
    (part,) = tokenize_conversation(tokenizer, conversation)
    assert said(tokenizer, part) == "f7<e>"
    conversation["messages"][1]["tool_calls"] = [{"name": "f"}]
    with pytest.raises(InputError, match="row, message 1: expected tool_calls like"):
        tokenize_conversation(tokenizer, conversation)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ({}, "SFT row 1: expected `messages`"),
        ({"messages": []}, "SFT row 1: expected `messages`"),
        ({"messages": "hi"}, "SFT row 1: expected `messages`"),
        ({"messages": ["hi"]}, "SFT row 1, message 0: expected an object with a `role`"),
        ({"messages": [{"content": "hi"}]}, "SFT row 1, message 0: expected an object"),
        (row("only a question"), "at least one message with role assistant"),
    ],
)
def test_bad_rows_are_named(conversation: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenize_rows(make_tokenizer(), [ROWS[0], conversation])


def test_no_rows_and_rows_that_are_too_long_are_named() -> None:
    with pytest.raises(InputError, match="at least one conversation"):
        tokenize_rows(make_tokenizer(), [])
    with pytest.raises(InputError, match="row 3: 51 tokens, expected at most 50"):
        tokenize_rows(make_tokenizer(), ROWS, max_tokens=50)


def test_files_name_their_lines(tmp_path: Path) -> None:
    lines = tmp_path / "chats.jsonl"
    lines.write_text(json.dumps(ROWS[0]) + '\n{"messages": 3}\n')
    rows, name = read_conversations(str(lines), tmp_path)
    with pytest.raises(InputError, match=r"chats\.jsonl', line 2: expected `messages`"):
        tokenize_rows(make_tokenizer(), rows, name=name)
    lines.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_conversations(str(lines), tmp_path)


@pytest.mark.parametrize("as_text", [False, True])
def test_parquet_holds_the_same_conversations(tmp_path: Path, as_text: bool) -> None:
    tokenizer = make_tokenizer()
    called = row("ab", "cd")
    called["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    rows = [called, *ROWS]
    column = [json.dumps(r["messages"]) if as_text else r["messages"] for r in rows]
    pq.write_table(pa.table({"messages": column}), tmp_path / "chats.parquet")
    read, name = read_conversations(str(tmp_path / "chats.parquet"), tmp_path)
    assert name(0).endswith("row 1")
    expected, found = tokenize_rows(tokenizer, rows), tokenize_rows(tokenizer, read)
    assert (expected.ids.tolist(), expected.weights.tolist()) == (
        found.ids.tolist(),
        found.weights.tolist(),
    )
    bad = pa.table({"messages": ["{"]})
    pq.write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"bad\.parquet', row 1: messages is a text that is no"):
        read_conversations(str(tmp_path / "bad.parquet"), tmp_path)
