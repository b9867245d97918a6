"""Conversations -> rows to fine-tune on: the ids of inference, and a weight on exactly the tokens that the model has to say.

A conversation is {"messages": [...], "tools": [...]} in OpenAI's form ("tools" may be left out; an assistant message with "weight": 0 is
context only). Each turn is rendered by the tokenizer's own chat template and tokenized in the pieces in which inference sees it: a prompt up
to the generation prompt, then what the model says up to and including its end of turn, then what follows up to the next generation prompt.
Where the template rewrites earlier turns (it drops their thoughts, say), the turn begins a row of its own, as it does in inference.

Called by learner/sft.py and `agl-ray sft`. Test it alone: tests/unit/test_learner_sft_rows.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agl_ray.config.rows import load_rows
from agl_ray.gateway.canonical import json_object
from agl_ray.gateway.render import stop_ids
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import InputError


class Part(NamedTuple):
    """A row of a conversation: ids, and for each 1.0 where the model has to say it, else 0.0."""

    ids: list[int]
    weights: list[float]


def read_conversations(spec: str, base: Path) -> tuple[list[dict[str, Any]], Callable[[int], str]]:
    """The rows of a .jsonl or .parquet file (or of `file.py:function`), and what each is called in messages: its line or row. In Parquet
    `messages` and `tools` are lists of structures or JSON text. InputError names the file and the line."""
    rows = load_rows(spec, 0, [], base)
    unit = "line" if spec.endswith(".jsonl") else "row"

    def name(index: int) -> str:
        return f"data {spec!r}, {unit} {index + 1}"

    if spec.endswith(".parquet"):
        rows = [_from_columns(row, name(i)) for i, row in enumerate(rows)]
    return rows, name


def _from_columns(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parquet fills keys that a message does not have with null."""
    found = dict(row)
    for key in ("messages", "tools"):
        value = found.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(
                    f"{name}: {key} is a text that is no JSON ({error}); expected a list"
                ) from error
        found[key] = _without_null(value)
    return found


def _without_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return value


def end_ids(tokenizer: Any, folder: Path | None = None) -> frozenset[int]:
    """Ids that end an assistant's turn; `folder`: of the model, whose generation_config.json may name more than the tokenizer."""
    if folder is not None:
        return stop_ids(tokenizer, folder)
    return frozenset({tokenizer.eos_token_id} - {None})


def tokenize_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    max_tokens: int | None = None,
    *,
    name: Callable[[int], str] = "SFT row {}".format,
    ends: frozenset[int] | None = None,
) -> Rows:
    """All conversations as columnar Rows, in order; weight 1.0 on what the model has to say. name: of a conversation, in messages. ends:
    None for the tokenizer's own. InputError where one is longer than `max_tokens`."""
    if not rows:
        raise InputError("SFT rows: expected at least one conversation, got none")
    parts: list[Part] = []
    for i, row in enumerate(rows):
        found = tokenize_conversation(tokenizer, row, name(i), ends)
        longest = max(len(part.ids) for part in found)
        if max_tokens is not None and longest > max_tokens:
            raise InputError(
                f"{name(i)}: {longest} tokens, expected at most {max_tokens}; shorten it or leave it out (agl-ray sft: --overlong)"
            )
        parts += found
    return Rows.from_lists([part.ids for part in parts], [part.weights for part in parts])


def tokenize_conversation(
    tokenizer: Any,
    row: Mapping[str, Any],
    name: str = "row",
    ends: frozenset[int] | None = None,
) -> list[Part]:
    """The rows of a conversation up to its last assistant turn: one, unless the template rewrites earlier turns.

    InputError names the conversation and what is wrong with it: no messages, nothing to learn, a template that refuses it or whose
    assistant turns cannot be told from their surroundings.
    """
    messages = _messages(row, name)
    ends = end_ids(tokenizer) if ends is None else ends
    learned = [_is_learned(message, f"{name}, message {i}") for i, message in enumerate(messages)]
    if not any(learned):
        roles = [message["role"] for message in messages]
        raise InputError(
            f"{name}: expected at least one message with role assistant (and weight 1) to learn from, got roles {roles}"
        )
    said_by = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    parts: list[Part] = []
    seen: str | None = None
    for turn in (turn for turn in said_by if turn <= max(_where(learned))):
        prompt, said = _turn_texts(tokenizer, messages, turn, row.get("tools"), name)
        if seen is None or not prompt.startswith(seen):
            parts.append(Part([], []))
            seen = ""
        _extend(parts[-1], _encode(tokenizer, prompt[len(seen) :]), 0.0)
        ids = _encode(tokenizer, said)
        end = max((place for place, token in enumerate(ids) if token in ends), default=-1)
        if end < 0:
            raise InputError(
                f"{name}: the chat template writes no end of turn after assistant message {turn}: expected one of the model's stop tokens "
                f"{tokenizer.convert_ids_to_tokens(sorted(ends))}, got {said[-40:]!r}; name it in generation_config.json (eos_token_id)"
            )
        _extend(parts[-1], ids[: end + 1], float(learned[turn]))
        seen = prompt + _upto(
            said, tokenizer.convert_ids_to_tokens(ids[end]), f"{name}, message {turn}"
        )
    return [part for part in parts if any(part.weights)]


def _upto(said: str, mark: str, name: str) -> str:
    """The text up to and including its last `mark`."""
    place = said.rfind(mark)
    if place < 0:
        raise InputError(
            f"{name}: expected the end of turn {mark!r} in the text that the chat template writes, got {said[-40:]!r}; the stop token "
            "must be a special token of the tokenizer"
        )
    return said[: place + len(mark)]


def _extend(part: Part, ids: list[int], weight: float) -> None:
    part.ids.extend(ids)
    part.weights.extend([weight] * len(ids))


def _where(learned: Sequence[bool]) -> list[int]:
    return [i for i, yes in enumerate(learned) if yes]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _messages(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages, checked, in the form that templates take (arguments of tool calls as values)."""
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(
            f"{name}: expected `messages`, a list of at least one message, got {_short(messages)}"
        )
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{name}, message {place}: expected an object with a `role`, got {_short(message)}"
            )
    return [
        _as_template_takes(message, f"{name}, message {i}") for i, message in enumerate(messages)
    ]


def _as_template_takes(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise InputError(
                f"{name}: expected tool_calls like {{'function': {{'name': ..., 'arguments': ...}}}}, got {_short(call)}"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json_object(arguments)
        made.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": made}


def _is_learned(message: Mapping[str, Any], name: str) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise InputError(f"{name}: expected weight 0 or 1, got {weight!r}")
    return message["role"] == "assistant" and weight == 1


def _turn_texts(
    tokenizer: Any, messages: Sequence[Any], turn: int, tools: Any, name: str
) -> tuple[str, str]:
    """The rendered prompt of assistant message `turn`, and what the template writes for that message."""
    from jinja2.exceptions import TemplateError

    def render(upto: int, generation: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages[:upto]), tools=tools, tokenize=False, add_generation_prompt=generation
        )
        return str(text)

    if not tokenizer.chat_template:
        raise InputError(
            "tokenizer: expected a chat template (tokenizer.chat_template), got none; use a chat model's tokenizer or set one"
        )
    try:
        prompt, whole = render(turn, True), render(turn + 1, False)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise InputError(f"{name}: the chat template refuses this conversation: {error}") from error
    if not whole.startswith(prompt):
        raise InputError(
            f"{name}: the chat template renders assistant message {turn} differently from its own generation prompt, so the "
            "tokens to learn cannot be told from the prompt"
        )
    return prompt, whole[len(prompt) :]


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else words[:77] + "..."
