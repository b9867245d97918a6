"""A child process of test_gateway_dialects_vllm.py: the gateway over a real vLLM engine, called in every dialect. Prints JSON.

Its own process, since vLLM's environment must be set before Python starts. Test code only.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
from gateway_fakes import FakeStore, save_model_folder

from actors.engine_vllm import sampling_params, start_vllm, to_chunk, to_result
from agl_ray.config.models import RunConfig
from agl_ray.gateway.door import Door, DoorSettings
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.http import GatewayApp
from agl_ray.gateway.render import Renderer
from agl_ray.types import InputError
from tests.integration import tiny_model

BASE = "/rollout/ro-1/attempt/at-1/v1"
SCHEMA = {
    "type": "object",
    "properties": {"expression": {"enum": ["1+1", "2+2"]}},
    "required": ["expression"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "1+1?"}]


class VllmEngine:
    """vLLM in this process as the door's engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def _outputs(self, request: GenerateRequest, stream: bool) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMError

        params = sampling_params(request, stream=stream)
        prompt = {"prompt_token_ids": request.prompt_ids}
        try:
            async for output in self._engine.generate(prompt, params, request.request_id):
                output.outputs[0].weight_versions = None  # no weights were ever sent
                yield output
        except (VLLMError, ValueError) as error:
            raise InputError(f"vLLM refuses the call: {error}") from error

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        last = None
        async for output in self._outputs(request, stream=False):
            last = output
        return to_result(last, request.request_id)

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        async for delta in self._outputs(request, stream=True):
            yield to_chunk(delta, request.request_id)


def make_folder(root: Path) -> Path:
    """A tiny random model with the tokenizer and template of the gateway's tests."""
    words = save_model_folder(root / "words")
    model = tiny_model.make(root / "model", eos_token_id=2, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, model / name)
    (model / "chat_template.jinja").unlink()  # it would go before the one in tokenizer_config.json
    return model


def turns(found: list[dict[str, Any]], answer: Any) -> list[dict[str, Any]]:
    return [*found, {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]


async def call_all(client: httpx.AsyncClient) -> dict[str, Any]:
    async def post(action: str, **body: Any) -> Any:
        answer = await client.post(f"{BASE}/{action}", json={"model": "tiny", **body})
        assert answer.status_code == 200, answer.text
        return answer.text if body.get("stream") else answer.json()

    chat = await post("chat/completions", messages=MESSAGES, max_tokens=12)
    said = turns(MESSAGES, chat["choices"][0]["message"]["content"])
    message = await post("messages", messages=said, max_tokens=12)
    said = turns(said, message["content"])
    text = "".join(block["text"] for block in message["content"])
    response = await post(
        "responses", input=turns(turns(MESSAGES, said[1]["content"]), text), max_output_tokens=12
    )
    streamed = await post(
        "responses",
        input="So?",
        previous_response_id=response["id"],
        max_output_tokens=12,
        stream=True,
    )
    first = await post("completions", prompt="1+1=", max_tokens=8, return_token_ids=True)
    ids = [*first["choices"][0]["prompt_token_ids"], *first["choices"][0]["token_ids"]]
    await post("completions", prompt=[*ids, 5, 6], max_tokens=8, stream=True)
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    formed = await post("chat/completions", messages=MESSAGES, response_format=form, max_tokens=300)
    tool = {"name": "calculator", "input_schema": SCHEMA}
    # Left free, a model with random weights may add call to call until its tokens are spent.
    one = {"type": "any", "disable_parallel_tool_use": True}
    forced = await post(
        "messages", messages=MESSAGES, tools=[tool], tool_choice=one, max_tokens=300
    )
    wrong = {"name": "s", "schema": {"type": "nonsense"}}
    refused = await client.post(
        f"{BASE}/chat/completions",
        json={
            "model": "tiny",
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": wrong},
        },
    )
    return {
        "formed": formed["choices"][0],
        "forced": forced,
        "streamed": streamed,
        "refused": [refused.status_code, refused.text],
    }


async def main(root: Path) -> None:
    folder = make_folder(root)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "data": {"train": "unused", "val": "unused"},
            "engine": {"max_model_len": 512, "max_num_seqs": 8},
        }
    )
    engine = start_vllm(config, str(folder), seed=1)
    renderer = Renderer(folder, "hermes")
    store = FakeStore("val")
    store.resources.resources["main_llm"].sampling_parameters.clear()
    door = Door(store, VllmEngine(engine), renderer, DoorSettings(max_model_len=512))
    transport = httpx.ASGITransport(GatewayApp(door, renderer))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway", timeout=120
    ) as client:
        found = await call_all(client)
    rows = await store.query_span_rows("ro-1")
    keys = ("agl.retokenized_tokens", "agl.branch_reason", "agl.constrained")
    found["calls"] = [
        {"dialect": row["dialect"], **{key: row["attributes"].get(key) for key in keys}}
        for row in rows
        if row["kind"] == "call"
    ]
    engine.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
