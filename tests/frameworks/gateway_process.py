"""A process of its own: the real gateway over a real vLLM engine and a real store (in memory), for agents of other frameworks.

    python gateway_process.py FOLDER        then JSON lines on its standard input, and one JSON line back for each:
    {"do": "attempt", "metadata": {...}} -> {"rollout_id", "attempt_id"}     {"do": "calls", "attempt": {...}} -> call spans
    {"do": "end", "attempt": {...}} -> {}       end of input: it stops

What the model says. Its weights are random, so every answer is sampled under a regular expression of the words that a good model
would say at this point of the conversation (`words`): vLLM draws among *all* ways to cut those words into tokens. Hardly any of
them is the tokenizer's own, so a gateway that tokenised an old answer again would be caught at once. A form that the caller asked
for by `tool_choice` is replaced by such words, which have that form; JSON of a schema is vLLM's own doing. Test code only; called by tests/frameworks/conftest.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from asgi_serving import serving  # noqa: E402
from gateway_fakes import save_model_folder  # noqa: E402

from actors.engine_vllm import start_vllm  # noqa: E402
from agl_ray.config.models import RunConfig  # noqa: E402
from agl_ray.gateway.door import Door, DoorSettings  # noqa: E402
from agl_ray.gateway.engine_api import (  # noqa: E402
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
)
from agl_ray.gateway.http import GatewayApp  # noqa: E402
from agl_ray.gateway.render import Renderer  # noqa: E402
from agl_ray.store import LightningStore, StoreCore  # noqa: E402
from agl_ray.types import LLM, EndReason  # noqa: E402
from tests.integration import tiny_model  # noqa: E402
from tests.integration.gateway_over_vllm import VllmEngine  # noqa: E402

CONTEXT = 32768
MODEL = "tiny"
QUESTION = re.compile(r"What is (\d+) plus (\d+)\?( Think first)?")
RESULT = re.compile(r"\d\+\d+=(\d+)")
CALCULATOR = re.compile(r" Tool: (\S*calculator)\b")
FINAL = " Tool: final_answer"
SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}/])")


def words(prompt: str) -> str:
    """A regular expression of what the model is to say after `prompt`: a call of the calculator after a question, the answer
    after its result; any words where there was no question."""
    questions, results = list(QUESTION.finditer(prompt)), list(RESULT.finditer(prompt))
    if not questions:
        return r"I am here to help\."
    calculator = CALCULATOR.search(prompt)
    if (results and results[-1].start() > questions[-1].start()) or calculator is None:
        answer = f"The answer is {results[-1].group(1) if results else 'unknown'}."
        return call("final_answer", {"answer": answer}) if FINAL in prompt else exactly(answer)
    left, right, think = questions[-1].groups()
    thought = exactly("Let me see.\n") if think else ""
    return thought + call(calculator.group(1), {"expression": f"{left}+{right}"})


def call(name: str, arguments: dict[str, str]) -> str:
    """A tool call, with as many spaces between its parts as the model likes."""
    inner = ", *".join(f'"{key}": *"{exactly(value)}"' for key, value in arguments.items())
    inner = inner.replace(" *", " {0,2}")
    return (
        r"<tool_call>\n\{"
        + f'"name": {{0,2}}"{exactly(name)}", {{0,2}}"arguments": {{0,2}}\\{{{inner}\\}}'
        + r"\}\n<\/tool_call>"
    )


def exactly(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text).replace("\n", r"\n")


class SpeakingEngine(VllmEngine):
    """vLLM in this process, made to say `words`."""

    def __init__(self, engine: Any, renderer: Renderer) -> None:
        super().__init__(engine)
        self._renderer = renderer

    def _told(self, request: GenerateRequest) -> GenerateRequest:
        if request.structure is not None and "structural_tag" not in request.structure:
            return request  # JSON is left to vLLM
        regex = words(self._renderer.decode(request.prompt_ids))
        return msgspec.structs.replace(request, structure={"regex": regex})

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await super().generate(self._told(request))

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        async for chunk in super().generate_stream(self._told(request)):
            yield chunk


def make_folder(root: Path) -> Path:
    """A tiny random model with the tokenizer and template of the gateway's tests, and a long context."""
    words_folder = save_model_folder(root / "words")
    model = tiny_model.make(
        root / "model", eos_token_id=2, pad_token_id=0, max_position_embeddings=CONTEXT
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (words_folder / name).replace(model / name)
    (model / "chat_template.jinja").unlink()  # it would go before the one in tokenizer_config.json
    return model


class Desk:
    """The commands."""

    def __init__(self, store: LightningStore, renderer: Renderer) -> None:
        self._store, self._renderer = store, renderer

    async def attempt(self, metadata: dict[str, Any]) -> dict[str, str]:
        made = await self._store.start_rollout("x", mode="train", metadata=metadata)
        return {"rollout_id": made.rollout_id, "attempt_id": made.attempt_id}

    async def calls(self, attempt: dict[str, str]) -> list[dict[str, Any]]:
        rows = await self._store.query_span_rows(attempt["rollout_id"], attempt["attempt_id"])
        keys = ("span_id", "parent_call", "dialect", "attributes")
        return [
            {key: row[key] for key in keys} | {"own_tokens": self._own(row["response_ids"])}
            for row in rows
            if row["kind"] == "call"
        ]

    def _own(self, ids: list[int]) -> bool:
        """Whether the tokenizer would cut the text of these ids so."""
        return self._renderer.encode(self._renderer.decode(ids)) == ids

    async def end(self, attempt: dict[str, str]) -> dict[str, str]:
        await self._store.end_attempt(
            attempt["rollout_id"], attempt["attempt_id"], EndReason.OK, reward=1.0
        )
        return {}


async def main(root: Path) -> None:
    folder = make_folder(root)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "data": {"train": "unused", "val": "unused"},
            "engine": {"max_model_len": CONTEXT, "max_num_seqs": 8},
        }
    )
    engine = start_vllm(config, str(folder), seed=1)
    renderer = Renderer(folder, "hermes")
    core = await StoreCore.open("memory://")
    store = LightningStore.local(core)
    settings = DoorSettings(max_model_len=CONTEXT, call_timeout_seconds=120.0)
    app = GatewayApp(Door(store, SpeakingEngine(engine, renderer), renderer, settings), renderer)
    async with serving(app) as url:
        await store.add_resources({"main_llm": LLM(endpoint=url, model=MODEL)})
        desk = Desk(store, renderer)
        print(json.dumps({"url": url}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            answer = await getattr(desk, command.pop("do"))(**command)
            print(json.dumps(answer), flush=True)
    await core.close()
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
