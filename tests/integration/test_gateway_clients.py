"""OpenAI's own client against the gateway over HTTP, in three dialects: whole, streamed, with tools, several turns, and errors."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from asgi_serving import serving
from gateway_desk import BASE, Desk, calls, says
from gateway_fakes import THINKING_TEMPLATE, save_model_folder

from agl_ray.gateway.engine_api import GenerateChunk
from agl_ray.gateway.render import Renderer
from agl_ray.types import EngineError

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "calculator", "parameters": SCHEMA}}
FLAT_TOOL: Any = {"type": "function", "name": "calculator", "parameters": SCHEMA, "strict": False}
THOUGHT = "<think>\nadd them\n</think>\n\n"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = save_model_folder(tmp_path_factory.mktemp("model"), THINKING_TEMPLATE)
    return Renderer(folder, "hermes", "deepseek_r1")


def use(desk: Desk, work: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        async with (
            serving(desk.app) as url,
            openai.AsyncOpenAI(
                base_url=f"{url}{BASE}/v1", api_key="k", max_retries=0, timeout=120
            ) as client,
        ):
            await work(client)

    asyncio.run(main())


def never_retokenized(desk: Desk, num_calls: int) -> None:
    rows = desk.rows
    assert len(rows) == num_calls
    for before, row in itertools.pairwise(rows):
        assert row["parent_call"] == before["span_id"]
        assert row["attributes"]["agl.retokenized_tokens"] == 0
        assert "agl.branch_reason" not in row["attributes"]


def test_responses_whole_and_by_previous_id(renderer: Renderer) -> None:
    script = [f"{THOUGHT}Let me see.{calls('1+1')}", "<think>ok</think>2", "<think></think>Yes."]
    desk = Desk(renderer, [says(renderer, text) for text in script], mode="train")

    async def work(client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(model="tiny", input="1+1?", tools=[FLAT_TOOL])
        thought, message, call = first.output
        assert thought.type == "reasoning"
        assert message.type == "message"
        assert call.type == "function_call"
        assert json.loads(call.arguments) == {"expression": "1+1"}
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        second = await client.responses.create(
            model="tiny", input=[result], tools=[FLAT_TOOL], previous_response_id=first.id
        )
        assert second.output_text == "2"
        items: Any = [{"role": "user", "content": "1+1?"}]
        items += [item.model_dump(exclude_none=True) for item in first.output]
        items += [result, *[item.model_dump(exclude_none=True) for item in second.output]]
        items.append({"role": "user", "content": "Sure?"})
        third = await client.responses.create(
            model="tiny", input=items, tools=[FLAT_TOOL], store=False
        )
        assert third.output_text == "Yes."
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model="tiny", input="x", previous_response_id=third.id)
        assert caught.value.code == "previous_response_not_found"

    use(desk, work)
    never_retokenized(desk, 3)


def test_responses_streamed(renderer: Renderer) -> None:
    script = [f"{THOUGHT}Let me see.{calls('1+1')}", "<think>ok</think>2"]
    desk = Desk(renderer, [says(renderer, text) for text in script], mode="train")

    async def work(client: openai.AsyncOpenAI) -> None:
        text = reasoning = ""
        async with client.responses.stream(model="tiny", input="1+1?", tools=[FLAT_TOOL]) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type == "response.reasoning_text.delta":
                    reasoning += event.delta
            final = await stream.get_final_response()
        assert (text, reasoning) == ("Let me see.", "add them")
        assert final.output_text == "Let me see."
        assert final.status == "completed"
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        call = final.output[2]
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        again = await client.responses.create(
            model="tiny",
            input=[result],
            tools=[FLAT_TOOL],
            previous_response_id=final.id,
            stream=True,
        )
        last = [event async for event in again][-1]
        assert last.type == "response.completed"
        assert last.response.output_text == "2"

    use(desk, work)
    never_retokenized(desk, 2)


def test_chat_whole_and_streamed(renderer: Renderer) -> None:
    script = [f"{THOUGHT}Let me see.{calls('1+1')}", "<think>ok</think>2"]
    desk = Desk(renderer, [says(renderer, text) for text in script], mode="train")

    async def work(client: openai.AsyncOpenAI) -> None:
        turns: Any = [{"role": "user", "content": "1+1?"}]
        first = await client.chat.completions.create(
            model="tiny", messages=turns, tools=[CHAT_TOOL]
        )
        message = first.choices[0].message
        assert message.model_extra is not None
        assert message.model_extra["reasoning_content"] == "add them"
        assert message.tool_calls
        turns.append(message.model_dump(exclude_none=True))
        turns.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"})
        async with client.chat.completions.stream(
            model="tiny", messages=turns, tools=[CHAT_TOOL]
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "2"

    use(desk, work)
    never_retokenized(desk, 2)


def test_completions_of_ids(renderer: Renderer) -> None:
    sampled = [token for letter in " The answer" for token in renderer.encode(letter)]
    desk = Desk(renderer, [(sampled, "length"), says(renderer, " is 2.")], mode="train")

    async def work(client: openai.AsyncOpenAI) -> None:
        start = renderer.encode("47+385?")
        first = await client.completions.create(
            model="tiny", prompt=start, logprobs=1, extra_body={"return_token_ids": True}
        )
        choice = first.choices[0]
        assert choice.text == " The answer"
        assert choice.logprobs is not None
        assert choice.model_extra is not None
        ids = choice.model_extra["token_ids"]
        chunks = await client.completions.create(
            model="tiny", prompt=[*start, *ids], stream=True, stream_options={"include_usage": True}
        )
        found = [chunk async for chunk in chunks]
        assert "".join(chunk.choices[0].text for chunk in found if chunk.choices) == " is 2."
        assert found[-1].usage is not None

    use(desk, work)
    never_retokenized(desk, 2)


@pytest.mark.parametrize("dialect", ["chat", "completions", "responses"])
def test_an_engine_that_fails_late_raises_in_the_client(renderer: Renderer, dialect: str) -> None:
    desk = Desk(renderer, [])
    ids = renderer.encode("<think>a</think>Well, well.")

    async def half(request: Any) -> Any:
        for token in ids:
            yield GenerateChunk(response_ids=[token], logprobs=[-0.5])
        raise EngineError("out of memory")

    desk.engine.generate_stream = half  # type: ignore[method-assign]

    async def work(client: openai.AsyncOpenAI) -> None:
        turns: Any = [{"role": "user", "content": "1+1?"}]
        starts: dict[str, Callable[[], Awaitable[Any]]] = {
            "chat": lambda: client.chat.completions.create(
                model="tiny", messages=turns, stream=True
            ),
            "completions": lambda: client.completions.create(
                model="tiny", prompt="1+1?", stream=True
            ),
            "responses": lambda: client.responses.create(model="tiny", input=turns, stream=True),
        }
        seen: list[Any] = []

        async def read() -> None:
            async for event in await starts[dialect]():
                seen.append(event)

        with pytest.raises(openai.APIError, match="out of memory"):
            await read()
        assert seen

    use(desk, work)
