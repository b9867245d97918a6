"""One real vLLM engine behind real Serve, following a real weight_sync: what it says equals Hugging Face, before, across and after updates.

The engine takes about 20 s to start and is shared by the tests of this file, which run in order and raise the weight version as they go.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from agl_ray.config.models import RunConfig
from agl_ray.gateway.engine_api import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    join_chunks,
)
from tests.integration import tiny_model
from tests.integration.weight_peers import Sender

pytestmark = pytest.mark.slow

NAMESPACE = "engine-tests"
PROMPT = [40 + i % 60 for i in range(70)]  # over two cache blocks long
_ids = itertools.count()


class Served:
    """The engine's handle, the sender that plays learner rank 0, and the model that the engine should have now."""

    def __init__(self, folder: Path, transport: str) -> None:
        from ray import serve

        from actors.engine import engine_deployment
        from actors.weight_sync import create_weight_sync

        self.folder = folder
        self.config = RunConfig.model_validate(
            {
                "model": {"path": str(folder)},
                "data": {"train": "unused", "val": "unused"},
                "engine": {"max_model_len": 256, "max_num_seqs": 32, "num_cpus": 0.5},
                "weights": {"transport": transport, "bucket_mib": 0.1},
            }
        )
        self.app = f"engine-{next(_ids)}"
        namespace = f"{NAMESPACE}-{self.app}"
        self.sync = create_weight_sync(self.config, namespace)
        self.learner = Sender.remote(bucket_bytes=100_000)
        ray.get(self.sync.set_learner.remote(self.learner), timeout=240)
        self.version = -1
        self.publish(folder)
        self.handle = serve.run(
            engine_deployment(self.config, folder, namespace), name=self.app, route_prefix=None
        )

    def publish(self, folder: Path, lost: int = 0) -> dict[str, Any]:
        self.version += 1
        tensors = [(name, tensor.numpy()) for name, tensor in tiny_model.weights(folder)]
        manifest = ray.get(self.learner.stage.remote(self.version, tensors), timeout=240)
        result: dict[str, Any] = ray.get(self.sync.publish.remote(manifest), timeout=240)
        assert len(result["lost"]) == lost
        assert result["checksum"] == manifest["checksum"]
        self.folder = folder
        return result

    def begun(self) -> tuple[Any, int]:
        """A call of 180 tokens that is being answered, asked again where it was over before we looked; the tokens answered before it."""
        self.generate()  # vLLM does not tell a replica's very first call that its core has died
        while True:
            before = self.stats()["tokens"]
            call = self.handle.generate.remote(self.request(max_tokens=180, ignore_eos=True))
            while (stats := self.stats())["tokens"] == before:
                if stats["running"] > 0:
                    return call, before
                time.sleep(0.001)

    def request(self, **fields: Any) -> GenerateRequest:
        given: dict[str, Any] = {"prompt_ids": PROMPT, "max_tokens": 20, "temperature": 0.0}
        return GenerateRequest(request_id=f"call-{next(_ids)}", **(given | fields))

    def generate(self, **fields: Any) -> GenerateResult:
        result: GenerateResult = self.handle.generate.remote(self.request(**fields)).result(
            timeout_s=240
        )
        return result

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.handle.stats.remote().result(timeout_s=240)
        return stats


def hf_logprobs(folder: Path, ids: list[int], temperature: float = 1.0) -> Any:
    """Log-probabilities of every id of `ids` given those before it (row i: of ids[i + 1]), and the whole table."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0] / temperature
    table = torch.log_softmax(logits, dim=-1)
    return table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], table


def assert_says(folder: Path, result: GenerateResult, prompt: list[int] = PROMPT) -> None:
    """The result is what the model of `folder` says: greedy ids and their logprobs to 1e-4."""
    import torch

    got, table = hf_logprobs(folder, prompt + result.response_ids)
    start = len(prompt) - 1
    assert result.response_ids == table[start:-1].argmax(-1).tolist()
    assert torch.allclose(got[start:], torch.tensor(result.logprobs), atol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model.make(root / name, seed=i) for i, name in enumerate("abc")}


@pytest.fixture(scope="module")
def served(ray_cluster: None, models: dict[str, Path]) -> Iterator[Served]:
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield Served(models["a"], "gloo")
    serve.shutdown()


def test_greedy_ids_and_logprobs_equal_hugging_face(
    served: Served, models: dict[str, Path]
) -> None:
    result = served.generate()
    assert_says(models["a"], result)
    assert result.finish_reason == "length"
    assert result.weight_versions == [(0, 0)]


def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    served: Served, models: dict[str, Path]
) -> None:
    import torch

    result = served.generate(temperature=0.7, seed=1, max_tokens=30)
    assert served.generate(temperature=0.7, seed=1, max_tokens=30) == result
    got, _ = hf_logprobs(models["a"], PROMPT + result.response_ids, temperature=0.7)
    assert torch.allclose(got[len(PROMPT) - 1 :], torch.tensor(result.logprobs), atol=1e-4)


def test_stop_strings_stop_ids_and_the_end_token(served: Served) -> None:
    plain = served.generate(ignore_eos=True)
    by_id = served.generate(stop_token_ids=[plain.response_ids[4]])
    first = plain.response_ids.index(plain.response_ids[4])
    assert by_id.response_ids == plain.response_ids[: first + 1]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", plain.response_ids[4])

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    letter = next(t for i in plain.response_ids if (t := tokenizer.decode([i])).isascii() and t)
    stopped = served.generate(stop=[letter])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", letter)
    assert letter in tokenizer.decode(stopped.response_ids)


def test_a_stream_joins_to_the_same_result(served: Served) -> None:
    async def collect() -> list[GenerateChunk]:
        stream = served.handle.options(stream=True).generate_stream.remote(served.request())
        return [chunk async for chunk in stream]

    chunks = asyncio.run(collect())
    assert len(chunks) > 3
    joined, whole = join_chunks(chunks), served.generate()
    assert joined.response_ids == whole.response_ids
    assert joined.weight_versions == whole.weight_versions
    assert joined.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "the prompt has 0 ids; expected 1 to 255"),
        ({"prompt_ids": [5] * 256}, "the prompt has 256 ids"),
        ({"temperature": -1.0}, "bad sampling parameters"),
        ({"prompt_ids": [10**6]}, "vLLM refuses"),
    ],
)
def test_impossible_requests_are_input_errors(
    served: Served, fields: dict[str, Any], message: str
) -> None:
    from agl_ray.types.errors import InputError

    with pytest.raises(InputError, match=message):
        served.generate(**fields)


def test_a_cancelled_call_is_aborted_in_vllm(served: Served) -> None:
    call, before = served.begun()
    call.cancel()
    while served.stats()["running"] > 0:
        time.sleep(0.005)
    assert served.stats()["tokens"] == before  # counted when a whole answer is given


def test_an_update_changes_every_answer_and_no_old_prefix_is_used(
    served: Served, models: dict[str, Path]
) -> None:
    assert served.generate().cached_tokens > 0  # the prompt of the tests before is cached
    result = served.publish(models["b"])
    assert result["transport"] == "gloo"
    assert result["followers"] == 1
    assert result["pause_seconds"] > 0
    after = served.generate()
    assert after.cached_tokens == 0
    assert after.weight_versions == [(0, 1)]
    assert_says(models["b"], after)
    assert served.generate().cached_tokens > 0


def test_a_call_in_flight_is_held_and_carries_both_versions(
    served: Served, models: dict[str, Path]
) -> None:
    import torch

    async def across() -> list[GenerateChunk]:
        request = served.request(max_tokens=180, ignore_eos=True)
        chunks = []
        stream = served.handle.options(stream=True).generate_stream.remote(request)
        publishing = None
        async for chunk in stream:
            chunks.append(chunk)
            if publishing is None:
                publishing = asyncio.create_task(asyncio.to_thread(served.publish, models["c"]))
        assert publishing is not None
        await publishing
        return chunks

    result = join_chunks(asyncio.run(across()))
    assert len(result.response_ids) == 180
    assert [version for _, version in result.weight_versions] == [1, 2]
    switch = result.weight_versions[1][0]
    assert 0 < switch < 180
    got = torch.tensor(result.logprobs)
    for folder, rows in ((models["b"], slice(0, switch)), (models["c"], slice(switch, None))):
        want, _ = hf_logprobs(folder, PROMPT + result.response_ids)
        assert torch.allclose(want[len(PROMPT) - 1 :][rows], got[rows], atol=1e-4)


def test_seeded_calls_survive_a_rush_and_repeat(served: Served) -> None:
    """More prompt tokens at once than fit into one step of the engine: none may be cut in two (engine_vllm.py says why)."""
    prompts = [[40 + (i * 7 + k * k) % 300 for k in range(200)] for i in range(64)]

    async def rush() -> list[list[int]]:
        calls = [
            served.handle.generate.remote(
                served.request(
                    prompt_ids=prompt, temperature=1.0, max_tokens=8, seed=i, ignore_eos=True
                )
            )
            for i, prompt in enumerate(prompts)
        ]
        return [result.response_ids for result in await asyncio.gather(*calls)]

    first, second = asyncio.run(rush()), asyncio.run(rush())
    assert first == second


def test_many_updates_under_load_drop_no_call(served: Served, models: dict[str, Path]) -> None:
    async def load() -> list[GenerateResult]:
        calls = [
            served.handle.generate.remote(
                served.request(
                    prompt_ids=[50 + i] * 5, temperature=1.0, max_tokens=100, ignore_eos=True
                )
            )
            for i in range(24)
        ]
        for name in "aba":
            await asyncio.to_thread(served.publish, models[name])
        return list(await asyncio.gather(*calls))

    results = asyncio.run(load())
    assert all(len(result.response_ids) == 100 for result in results)
    for result in results:
        starts = [start for start, _ in result.weight_versions]
        versions = [version for _, version in result.weight_versions]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert versions == sorted(set(versions))
    assert_says(models["a"], served.generate())
    assert served.stats()["updates"] == served.version + 1
