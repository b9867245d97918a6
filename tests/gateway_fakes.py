"""Fakes of the gateway's tests: a real byte-level BPE tokenizer with a chat template, a scripted engine, a store of dictionaries.

Test code only. The tokenizer is FACTS' recipe for the quickstart: no word regex, so that constant text is few tokens, and sampled
sequences easily tokenise otherwise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.types import LLM, Attempt, NotFound, ResourcesUpdate, Rollout

TEMPLATE = """{%- if tools -%}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') -}}
{%- for tool in tools -%}{{- ' Tool: ' + tool.function.name -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '\n' if message.content or not loop.first -}}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
{%- elif message.role == 'user' or not loop.first -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

TRIMMING_TEMPLATE = TEMPLATE.replace("(message.content or '')", "(message.content or '') | trim")
FORGETTING_TEMPLATE = TEMPLATE.replace(
    "(message.content or '')", "(message.content or '').split('</think>')[-1]"
)
OPENING_TEMPLATE = FORGETTING_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
    "{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}",
)
"""As R1's: the prompt opens the thoughts, and past answers are without them."""
THINKING_TEMPLATE = TEMPLATE.replace(
    "{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
    "{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '')"
    " -}}{%- endif -%}",
)
"""As Qwen3's: thoughts can be switched off; but it keeps those of old turns where they are in the content."""
END = "<|im_end|>"
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "what is forty-seven plus 385? add A and B. The answer is 432.",
        '{"name": "calculator", "arguments": {"expression": "47+385"}}',
        "You are a calculator agent. Tools: calculator\nuser\nassistant\n",
    ] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    plain = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    plain += ["<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def save_model_folder(folder: Path, template: str = TEMPLATE) -> Path:
    """A folder that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return folder


class TinyText:
    """A `TextModel` of tokenizers and jinja2 alone; counts the renderings."""

    def __init__(self, template: str = TEMPLATE) -> None:
        self.tokenizer = make_tokenizer()
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(template)
        self.end_id = self.tokenizer.token_to_id(END)
        self.renderings = 0

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        self.renderings += 1
        return self._template.render(messages=messages, tools=tools, add_generation_prompt=True)

    def encode(self, text: str, after: str = "") -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class FakeEngine:
    """Answers from a script: a list of answers, or a function from the request to one. An answer is (ids, finish_reason), or
    an exception. Logprobs are -0.5 each; the weight version is 7."""

    def __init__(self, script: list[Any] | Callable[[GenerateRequest], Any]) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.hold: asyncio.Event | None = None
        self.asked = asyncio.Event()

    async def _answer(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        self.asked.set()
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        answer = self.script(request) if callable(self.script) else self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, GenerateResult):
            return answer
        ids, finish = answer
        return GenerateResult(
            response_ids=list(ids),
            logprobs=[-0.5] * len(ids),
            weight_versions=[(0, 7)],
            finish_reason=finish,
        )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await self._answer(request)

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        result = await self._answer(request)
        for token, logprob in zip(result.response_ids, result.logprobs, strict=True):
            yield GenerateChunk(response_ids=[token], logprobs=[logprob])
            await asyncio.sleep(0)
        yield GenerateChunk(
            response_ids=[],
            logprobs=[],
            finish_reason=result.finish_reason,
            weight_versions=result.weight_versions,
            stop_reason=result.stop_reason,
        )


class FakeStore:
    """The gateway's part of LightningStore over dictionaries; `batches` are the spans in order."""

    def __init__(self, mode: str = "train", metadata: dict[str, Any] | None = None) -> None:
        self.notes: list[dict[str, Any]] = []
        self.rollout = Rollout(
            rollout_id="ro-1",
            input="x",
            start_time=0.0,
            mode=mode,
            resources_id="rs-1",
            metadata=metadata or {},
        )
        self.attempt = Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0)
        self.resources = ResourcesUpdate(
            resources_id="rs-1",
            create_time=0.0,
            update_time=0.0,
            version=1,
            resources={
                "main_llm": LLM(
                    endpoint="http://x", model="tiny", sampling_parameters={"max_tokens": 40}
                )
            },
        )
        self.batches: list[pa.RecordBatch] = []
        self.lookups = 0
        self.refuse: Exception | None = None

    async def get_rollout_in_full(
        self, rollout_id: str
    ) -> tuple[Rollout, Attempt | None, ResourcesUpdate | None] | None:
        self.lookups += 1
        if rollout_id != self.rollout.rollout_id:
            return None
        return self.rollout, self.attempt, self.resources

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        if rollout_id != self.rollout.rollout_id:
            raise NotFound(f"rollout {rollout_id} is unknown")
        return self.attempt

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, *, metadata: dict[str, Any]
    ) -> Any:
        self.notes.append(metadata)

    async def add_spans(
        self, rollout_id: str, attempt_id: str, batch: Any, batch_id: str | None = None
    ) -> Any:
        if self.refuse is not None:
            raise self.refuse
        self.batches.append(batch)
        return [len(self.batches)]

    async def query_span_rows(
        self, rollout_id: str, attempt_id: str | None = None
    ) -> list[dict[str, Any]]:
        rows = [row for batch in self.batches for row in batch.to_pylist()]
        for row in rows:
            row["attributes"] = {key: json.loads(value) for key, value in row["attributes"] or []}
        return rows
