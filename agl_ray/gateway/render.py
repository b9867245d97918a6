"""Text and ids: chat template rendering, tokenising, detokenising, tool-call and reasoning parsing.

Called by: the door (one `Renderer` per gateway process) and, through the small `TextModel` protocol, the sessions. The
tokenizer is transformers', the parsers of tool calls and thoughts are vLLM's own; both are imported when a Renderer is made, that is at the
start of a gateway replica and not at the first call (about 5 s and 0.5 GB together, most of it torch and vLLM).
Test alone: `pytest tests/unit/test_gateway_render.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from agl_ray.gateway.canonical import Refusal, ToolCall, json_object
from agl_ray.gateway.decoding import Decoder
from agl_ray.gateway.encoding import Encoder
from agl_ray.gateway.reasoning import Thoughts
from agl_ray.types import InputError

# Characters. Without an end a weak model fills its whole answer with blanks; indented JSON needs about this much.
MAX_WHITESPACE = 32
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character


class TextModel(Protocol):
    """What a session needs of a tokenizer and its chat template."""

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """The conversation as text, up to and including the generation prompt."""
        ...

    def encode(self, text: str, after: str = "") -> list[int]:
        """Ids of `text`, which stands behind the special token `after` (empty: at the start, or behind plain text)."""
        ...


class Renderer:
    """The tokenizer, chat template and parsers of one model folder.

    `tool_parser` and `reasoning_parser` are names of vLLM's (`hermes`, `qwen3`, ...) or None. InputError where the folder has no
    tokenizer, no fast tokenizer or no chat template, or where vLLM knows no such parser.
    """

    def __init__(
        self,
        model_path: str | Path,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        self._tokenizer = _load_tokenizer(Path(model_path))
        self._backend = self._tokenizer.backend_tokenizer
        self.stop_ids = stop_ids(self._tokenizer, Path(model_path))
        self._encoder = Encoder(self._backend, self._turn_marks())
        # An answer's text is asked for twice, as the model wrote it and as the caller sees it; mostly that is the same.
        self._text = functools.lru_cache(maxsize=4)(Decoder(self._backend).decode)
        added = self._backend.get_added_tokens_decoder().items()
        self._special_ids = frozenset(number for number, token in added if token.special)
        self._anchored = self._needs_anchor()
        self._parser = _load_parser(tool_parser) if tool_parser else None
        start = getattr(self._parser, "tool_call_start_token", None)
        self.tool_start: str | None = start if isinstance(start, str) and start else None
        self.thoughts = Thoughts(reasoning_parser, self._tokenizer) if reasoning_parser else None
        known: int = self._backend.get_vocab_size(with_added_tokens=True)
        # Models are padded to more ids than their tokenizer knows, and may sample those.
        self.num_ids = max(known, _model_ids(Path(model_path)))
        # What the tokenizer puts before a raw prompt (Llama's "<|begin_of_text|>").
        self.raw_start = self.decode(self._tokenizer.encode("", add_special_tokens=True))

    @property
    def parses_tools(self) -> bool:
        return self._parser is not None

    def knows(self, option: str) -> bool:
        """Whether the chat template looks at this option (`enable_thinking`, ...). What is set elsewhere is no option."""
        taken = inspect.signature(self._tokenizer.apply_chat_template).parameters
        if option in taken or option == "messages" or option.endswith("_token"):
            return False
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any(re.search(rf"\b{re.escape(option)}\b", text) for text in texts)

    def thoughts_over(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves no room for thoughts: its last turn, the opened answer, has them closed already."""
        if self.thoughts is None:
            return True
        last = len(prompt_ids)
        while last and prompt_ids[last - 1] not in self.stop_ids:
            last -= 1
        return self.thoughts.over(prompt_ids[last:])

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        **options: Any,
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise Refusal(
                400,
                f"messages: the model's chat template refuses this conversation: {error}",
                param="messages",
                code="invalid_value",
            ) from error
        return str(text)

    def encode(self, text: str, after: str = "") -> list[int]:
        if after and self._anchored:
            return self._encoder.encode(after + text)[1:]
        return self._encoder.encode(text)

    def decode(self, ids: Sequence[int], keep_special: bool = True) -> str:
        if not keep_special and not self._special_ids.isdisjoint(ids):
            return str(self._backend.decode(list(ids), skip_special_tokens=True))
        return self._text(tuple(ids))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each id's own text; parts of a character read as U+FFFD."""
        return [self.decode([token]) for token in ids]

    def split(self, ids: Sequence[int], stop_id: bool) -> tuple[str, str]:
        """The response as (body, end): the text of all ids, and apart from it that of the id that ended it, if one did."""
        if stop_id and ids:
            return self.decode(ids[:-1]), self.decode(ids[-1:])
        return self.decode(ids), ""

    def check_tools(self, tools: list[dict[str, Any]]) -> None:
        """Refusal for tools that vLLM's parsers cannot take, before anything is sampled for them."""
        try:
            _parser_request(msgspec.json.encode(tools))
        except ValueError as error:
            raise Refusal(
                400,
                f"tools: they are not of the form that calls are read by: {error}",
                param="tools",
                code="invalid_value",
            ) from error

    def find_tool_calls(
        self, text: str, tools: list[dict[str, Any]]
    ) -> tuple[str | None, list[ToolCall]]:
        """(content, tool calls) of an answer, as vLLM's parser reads it; text that it cannot parse comes back whole, and so does a
        call whose arguments are no JSON object, which nobody could send back."""
        if self._parser is None:
            raise ValueError("find_tool_calls: this renderer was made without a tool parser")
        if self.tool_start is not None and self.tool_start not in text:
            return text, []
        request = _parser_request(msgspec.json.encode(tools))
        found = self._parser(self._tokenizer).extract_tool_calls(text, request)
        if not found.tools_called:
            return text, []
        calls = [
            ToolCall(
                id=f"call_{secrets.token_hex(12)}",
                name=call.function.name,
                arguments=_no_null(call.function.arguments),
            )
            for call in found.tool_calls
        ]
        if not all(isinstance(json_object(call.arguments), dict) for call in calls):
            return text, []
        return found.content or None, calls

    def call_form(
        self, tools: list[dict[str, Any]], name: str | None, *, parallel: bool = True
    ) -> str | None:
        """The grammar of an answer that calls a tool (this one, or any) in the model's own spelling, as vLLM's structural tag in JSON;
        None where vLLM knows none for this parser. parallel: more calls may follow the first."""
        # What is forced keeps to its schema too, whether the caller calls the tool strict or not.
        strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
        choice = "required" if name is None else {"type": "function", "function": {"name": name}}
        request = _parser_request(msgspec.json.encode(strict), msgspec.json.encode(choice))
        if self._parser is None:
            return None
        tag = self._parser(self._tokenizer).get_structural_tag(request)
        if tag is None:
            return None
        form = tag.model_dump()
        limits: dict[str, Any] = {"max_whitespace_cnt": MAX_WHITESPACE}
        _tighten(form, limits if parallel else {**limits, "stop_after_first": True})
        return msgspec.json.encode(form).decode()

    def _turn_marks(self) -> list[str]:
        """The special tokens that the chat template writes: between them stands what a conversation repeats."""
        known = self._tokenizer.chat_template
        template = "".join(known.values()) if isinstance(known, dict) else known
        return [token for token in self._tokenizer.all_special_tokens if token in template]

    def _needs_anchor(self) -> bool:
        """Whether a piece of text gets other ids at the start than behind a special token (sentencepiece's first space)."""
        token = self._tokenizer.eos_token
        if token is None:
            return False
        joined = self.encode(token + "a")
        return len(joined) > 1 and joined[1:] != self.encode("a")


def _tighten(form: Any, limits: dict[str, Any]) -> None:
    """Set each of `limits` wherever a structural tag, read as JSON, has such a key (the tools' own schemas are left alone)."""
    if isinstance(form, list):
        for part in form:
            _tighten(part, limits)
    elif isinstance(form, dict):
        form.update({key: value for key, value in limits.items() if key in form})
        for key, part in form.items():
            if key != "json_schema":
                _tighten(part, limits)


class Optioned:
    """A `TextModel` that renders with options of the chat template."""

    def __init__(self, renderer: Renderer, options: dict[str, Any]) -> None:
        self._renderer, self._options = renderer, options
        self.encode = renderer.encode

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return self._renderer.render(messages, tools, **self._options)


class Detokenizer:
    """Ids of a stream to text, piece by piece, never half a character.

    `push` returns the text that became certain, `finish` what is left; joined they are `decode(all ids)`. Works on a window
    of the last ids, so that a long answer costs linear time.
    """

    def __init__(self, renderer: Renderer, keep_special: bool) -> None:
        self._renderer = renderer
        self._keep = keep_special
        self._ids: list[int] = []
        self._window = 0  # ids before this one are out of the window
        self._read = 0  # text of the ids before this one was returned
        self._text: list[str] = []

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        known = self._renderer.decode(self._ids[self._window : self._read], self._keep)
        text = self._renderer.decode(self._ids[self._window :], self._keep)
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._read = self._read, len(self._ids)
        self._text.append(text[len(known) :])
        return self._text[-1]

    def finish(self) -> str:
        whole, sent = self._renderer.decode(self._ids, self._keep), "".join(self._text)
        return whole[len(sent) :] if whole.startswith(sent) else ""


def _no_null(arguments: str) -> str:
    """A call without arguments may be written with null."""
    return "{}" if arguments.strip() in ("", "null") else arguments


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise InputError(
            f"model folder {str(folder)!r}: no such folder; give a folder with the model's files"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model folder {str(folder)!r}: transformers finds no tokenizer in it ({error}); "
            "expected tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"model folder {str(folder)!r}: a fast tokenizer (tokenizer.json) is needed"
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"model folder {str(folder)!r}: the tokenizer has no chat template, so chats cannot be rendered; "
            "add chat_template.jinja or the key chat_template of tokenizer_config.json"
        )
    return tokenizer


def stop_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Ids that end a turn: the tokenizer's end-of-sequence and those of generation_config.json, as the engine reads them."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    if path.exists():
        given = msgspec.json.decode(path.read_bytes()).get("eos_token_id")
        ids.update(given if isinstance(given, list) else [] if given is None else [given])
    return frozenset(ids)


def _model_ids(folder: Path) -> int:
    """The model's number of ids, as its config.json says; 0: it does not."""
    path = folder / "config.json"
    config = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    sizes = [config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size")]
    return max(size for size in (0, *sizes) if isinstance(size, int))


def _load_parser(name: str) -> Any:
    from vllm.tool_parsers import ToolParserManager

    # A malformed tool call is daily bread in training; vLLM would log a stack trace for each.
    logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)
    try:
        return ToolParserManager.get_tool_parser(name)
    except KeyError as error:
        known = ", ".join(ToolParserManager.list_registered())
        raise InputError(
            f"engine.tool_parser: vLLM knows no parser {name!r}; expected one of {known}"
        ) from error


@functools.lru_cache(maxsize=64)
def _parser_request(tools: bytes, choice: bytes = b'"auto"') -> Any:
    """vLLM's own request object: most parsers ignore it, some look up the schemas of the tools (given as JSON, as is the choice)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(
        model="",
        messages=[{"role": "user", "content": ""}],
        tools=msgspec.json.decode(tools),
        tool_choice=msgspec.json.decode(choice),
    )
