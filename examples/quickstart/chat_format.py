"""The chat template and the tokenizer of the quickstart's base model.

The template writes turns and tool calls as Qwen3 does (vLLM's `hermes` parser reads them), but of the tools only their names: this
tiny model can read no schema. A tool call's arguments are written as they came when they are JSON text, so that what the
model said is rendered as it said it. Called by base_model.py; test alone: tests/unit/test_quickstart_chat_format.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import task
from agent import TOOLS
from lessons import habit_rows, skill_rows

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

CHAT_TEMPLATE = r"""
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools or system -%}
    {{- '<|im_start|>system\n' + system -}}
    {%- if tools -%}
        {{- ' Tools: ' if system else 'Tools: ' -}}
        {%- for tool in tools -%}
            {{- tool.function.name + ('' if loop.last else ', ') -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '' if loop.first else '\n' -}}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {%- if call.function.arguments is string -%}
                {{- call.function.arguments -}}
            {%- else -%}
                {{- call.function.arguments | tojson -}}
            {%- endif -%}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '' if loop.previtem.role == 'tool' else '<|im_start|>user' -}}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of some 470 tokens, the same for every seed.

    Digits and number words stay whole tokens, so that numbers can be copied; everything else may merge freely, so that the
    constant parts of a conversation ("The answer is ", the JSON around an expression) are one token each.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = sorted([*task.ONES, *task.TENS], key=len, reverse=True)
    split = pre_tokenizers.Split(Regex("|".join([r"\d", *words])), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    """Training text for the BPE: conversations cut where special tokens stand and where the model begins to speak."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rows = skill_rows(0, 600) + habit_rows(0, 600)
    rendered, _ = render_jinja_template(
        [r["messages"] for r in rows], TOOLS, chat_template=CHAT_TEMPLATE
    )
    markers = "|".join(re.escape(text) for text in SPECIAL + MARKUP)
    for text in rendered:
        for piece in re.split(markers, text):
            head, mark, tail = piece.partition("assistant\n")
            yield from (part for part in (head + mark, tail) if part)
