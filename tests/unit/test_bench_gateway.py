"""The gateway's benchmark: its sizes are what they say, its callers keep their conversations, every number it can give has a meaning."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from asgi_serving import serving

from agl_ray.bench import gateway as bench
from agl_ray.bench.gateway_keys import CHAT, KEYS, LONG, LONG_NEW, Size
from agl_ray.bench.gateway_load import Caller, Load, http_session, run_load, text
from agl_ray.bench.gateway_parts import END, InstantEngine, echo, make_tokenizer_folder, words
from agl_ray.gateway.engine_api import GenerateRequest
from agl_ray.ops.asgi import Receive, Scope, Send, read_body, respond
from agl_ray.types import RunError

SMALL = Size("small", prompt=20, added=5, response=8, turns=3, group=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("model"))


def test_sizes_are_what_they_say(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (CHAT.mean_prompt, LONG.mean_prompt, LONG_NEW.mean_prompt) == (200, 8192, 8192)
    for size in (CHAT, LONG, LONG_NEW):
        got = len(tokenizer.encode(text(1, size.prompt)).ids)
        assert abs(got - size.prompt) < 0.2 * size.prompt, size


def test_the_instant_engine_answers_as_long_as_asked(folder: Path) -> None:
    engine = InstantEngine(str(folder))
    request = GenerateRequest(request_id="a", prompt_ids=[1], max_tokens=100)

    async def both() -> Any:
        whole = await engine.generate(request)
        return whole, [chunk async for chunk in engine.generate_stream(request)]

    whole, chunks = asyncio.run(both())
    assert len(whole.response_ids) == len(whole.logprobs) == 100
    assert (whole.finish_reason, chunks[-1].finish_reason) == ("stop", "stop")
    assert whole.response_ids[-1] == 2 != whole.response_ids[0]
    assert END in (folder / "tokenizer_config.json").read_text()


def test_a_conversation_grows_and_groups_share_their_first_prompt() -> None:
    bodies: list[dict[str, Any]] = []

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(msgspec.json.decode(await read_body(receive)))
        made = {"choices": [{"message": {"content": f"answer {len(bodies)}"}}]}
        await respond(send, 200, msgspec.json.encode(made))

    async def main() -> Load:
        async with serving(answers) as url, http_session(2) as session:
            return await run_load(Caller(session, SMALL), [bench._at(url)] * 4, 1)

    load = asyncio.run(main())
    assert len(load.took) == 4 * SMALL.turns
    assert load.per_s > 0
    assert load.quantile_ms(0.5) <= load.quantile_ms(0.99)
    assert [len(body["messages"]) for body in bodies[:3]] == [1, 3, 5]
    assert bodies[1]["messages"][1]["content"] == "answer 1"
    firsts = [body["messages"][0]["content"] for body in bodies[::3]]
    assert firsts[0] == firsts[1] != firsts[2] == firsts[3]
    assert bodies[0]["max_tokens"] == SMALL.response


def test_an_echo_is_talked_to_and_a_refusal_ends_the_measurement() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 503, b"no")

    async def main() -> None:
        async with http_session(2) as session:
            async with serving(echo) as url:
                load = await run_load(
                    Caller(session, SMALL, echoes=True), [bench._at(url)] * 3, 2, turns=2
                )
                assert len(load.took) == 6
            async with serving(refuses) as url:
                with pytest.raises(RunError, match="503"):
                    await run_load(Caller(session, SMALL), [bench._at(url)], 1)

    asyncio.run(main())


def test_words_are_the_same_for_the_same_seed() -> None:
    assert words(3, 10) == words(3, 10) != words(4, 10)


def test_the_differences_have_meanings() -> None:
    numbers = dict.fromkeys(KEYS, 2.0) | {"p50_ms_chat": 5.0}
    made = bench._differences(numbers, bench.FULL)
    assert made["added_p50_ms"] == 3.0
    assert made["vllm_ratio_8k"] == 1.0
    assert made.keys() <= KEYS.keys()


@pytest.mark.slow
def test_a_whole_small_measurement(tmp_path: Path) -> None:
    alone = {"chat": 2, "8k": 1}
    few = {**alone, "8k_new": 1}
    amounts = bench.Amounts(alone=alone, at_once=few, sessions=8, growth=16, rollouts=20, vllm={})
    # In a process of its own: it starts a Ray, and the session of these tests may have one.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        numbers = pool.submit(bench.run_gateway, cache=tmp_path, amounts=amounts).result(300)
    only_full = {key for key, text in KEYS.items() if "(full run)" in text}
    assert numbers.keys() == KEYS.keys() - only_full
    assert numbers["retokenized_tokens"] == 0
    assert numbers["growth_calls"] == 16
    assert min(numbers[key] for key in KEYS if "calls_per_s" in key and key in numbers) > 0
