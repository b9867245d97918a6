"""The teacher's client over a real HTTP server: what it reads, what it tries again, what it drops, what stops the run, whom it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from learner_data import VOCABULARY, model_folder
from tokenizers import Tokenizer

from actors.learner_group import START, setup_seconds
from agl_ray.config import RunConfig
from agl_ray.config.teacher import TeacherConfig
from agl_ray.learner import teacher as module
from agl_ray.learner.teacher import Scores, Teacher
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import ConfigError, RunError, WaitTimeout

Answer = Callable[[list[int]], Any]
"""From a row's ids to a body, a status, or seconds of silence (a float) before the true answer."""


def logprob(ids: list[int], place: int) -> float:
    """A made-up one that depends on the whole row up to there."""
    return -0.01 * (1 + sum(ids[: place + 1]) % 97)


def completion(ids: list[int]) -> dict[str, Any]:
    """As vLLM answers."""
    every = [
        {str(one): {"logprob": logprob(ids, i), "rank": 1, "decoded_token": "x"}}
        for i, one in enumerate(ids)
    ]
    return {"id": "c", "choices": [{"text": "y", "prompt_logprobs": [None, *every[1:]]}]}


class Server:
    """answer: to completions. most: its --max-model-len. words: its tokenizer.json."""

    def __init__(self, answer: Answer = completion, most: int = 4096) -> None:
        self.answer, self.most, self.words = answer, most, ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0.01)
        made = self.answer(body["prompt"])
        if isinstance(made, float):
            await asyncio.sleep(made)
            made = completion(body["prompt"])
        self.open -= 1
        if isinstance(made, int):
            return web.Response(status=made, text="no")
        return web.Response(text=json.dumps(made), content_type="application/json")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "large", "max_model_len": self.most}]})

    async def detokenize(self, request: web.Request) -> web.Response:
        tokens = (await request.json())["tokens"]
        text = Tokenizer.from_file(self.words).decode(tokens, skip_special_tokens=False)
        return web.json_response({"prompt": text})


def with_server(server: Server, work: Callable[[str], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        app = web.Application()
        app.router.add_post("/v1/completions", server.completions)
        app.router.add_get("/v1/models", server.models)
        if server.words:
            app.router.add_post("/detokenize", server.detokenize)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
        try:
            return await work(f"http://127.0.0.1:{runner.addresses[0][1]}/v1/")
        finally:
            await runner.cleanup()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def some_rows(number: int = 5) -> Rows:
    chance = np.random.default_rng(number)
    ids = [chance.integers(0, VOCABULARY, 3 + i) for i in range(number)]
    weights = [[0.0] + [1.0] * (len(row) - 2) + [0.0] for row in ids]
    return Rows.from_lists(ids, weights, temperature=[[1.0] * len(row) for row in ids])


def score(server: Server, rows: Rows, **options: Any) -> Scores:
    async def work(url: str) -> Scores:
        config = TeacherConfig(base_url=url, model="large", **options)
        return await Teacher(config, 1024).score(rows)

    return with_server(server, work)  # type: ignore[no-any-return]


def test_every_trained_token_gets_its_own_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    server, rows = Server(), some_rows(40)
    made = score(server, rows, api_key_env="TEACHER_KEY", concurrency=3)
    wanted = np.zeros(len(rows.ids), np.float32)
    for start, length in zip(rows.starts, rows.lengths, strict=True):
        ids = rows.ids[start : start + length].tolist()
        for place in range(1, length - 1):
            wanted[start + place] = logprob(ids, place)
    np.testing.assert_array_equal(made.logprobs, wanted)
    assert made.scored.all()
    assert made.counts["rows_scored"] == 40
    assert made.counts["rows_dropped_unscored"] == made.counts["teacher_retries"] == 0
    assert server.most_open == 3
    assert set(server.keys) == {"Bearer secret"}
    assert {**server.bodies[0], "prompt": 0} == {
        "model": "large",
        "prompt": 0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }


def without(change: Callable[[list[Any]], Any]) -> Answer:
    """An answer whose prompt_logprobs are changed."""

    def answer(ids: list[int]) -> Any:
        body = completion(ids)
        body["choices"][0]["prompt_logprobs"] = change(body["choices"][0]["prompt_logprobs"])
        return body

    return answer


def at_one(value: Any) -> Answer:
    def change(given: list[Any]) -> list[Any]:
        given[1] = {key: {"logprob": value} for key in given[1]}
        return given

    return without(change)


BAD: dict[str, tuple[Answer, str]] = {
    "a wrong length": (without(lambda given: given[:-1]), "tokens, got"),
    "none at all": (without(lambda given: None), "expected prompt_logprobs, got none"),
    "another token": (
        without(lambda given: [given[0], {"999": {"logprob": -1.0}}, *given[2:]]),
        "token 1: expected the log-probability of id",
    ),
    "NaN": (at_one(float("nan")), "completions: "),
    "minus infinity": (at_one(float("-inf")), "completions: "),
    "logits": (at_one(3.5), "expected a log-probability, got 3.5"),
    "a text": (at_one("high"), "Expected `float`, got `str`"),
    "no choice": (lambda ids: {"choices": []}, "expected prompt_logprobs, got none"),
    "a refusal": (lambda ids: 400, "status 400: no"),
    "failing without end": (lambda ids: 500, "it failed 3 times: .*status 500"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_row_that_cannot_be_scored_is_dropped_and_counted(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, words = BAD[name]
    rows = some_rows()
    unlucky = rows.ids[rows.starts[2] : rows.starts[3]].tolist()
    server = Server(lambda ids: (bad if ids == unlucky else completion)(ids))
    made = score(server, rows, retries=2)
    assert made.scored.tolist() == [True, True, False, True, True]
    assert made.counts["rows_dropped_unscored"] == 1
    assert made.counts["tokens_dropped_unscored"] == len(unlucky) - 2
    assert "did not score 1 of 5 rows" in caplog.text
    with pytest.raises(RunError, match=f"did not score 5 of 5 rows; the last one: .*{words}"):
        score(Server(bad), rows, retries=2)


def test_too_few_rows_stop_the_run() -> None:
    rows = some_rows()
    server = Server(lambda ids: 400 if len(ids) < 5 else completion(ids))
    assert score(server, rows, min_scored=0.6).scored.sum() == 3
    with pytest.raises(RunError, match=r"did not score 2 of 5 rows.*min_scored 0\.7"):
        score(server, rows, min_scored=0.7)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status: int) -> None:
    seen: dict[int, int] = {}

    def answer(ids: list[int]) -> Any:
        seen[len(ids)] = seen.get(len(ids), 0) + 1
        return status if seen[len(ids)] < 3 else completion(ids)

    made = score(Server(answer), some_rows(), retries=2)
    assert made.scored.all()
    assert made.counts["teacher_retries"] == 10


def test_a_slow_answer_is_given_up_and_tried_again() -> None:
    slow = iter([9.0])
    server = Server(lambda ids: next(slow, None) or completion(ids))
    made = score(server, some_rows(), request_seconds=0.6)
    assert made.scored.all()
    assert made.counts["teacher_retries"] >= 1


def test_rows_without_an_answer_at_the_deadline_are_dropped() -> None:
    server = Server(lambda ids: 600.0 if len(ids) == 4 else completion(ids))
    made = score(server, some_rows(), deadline_seconds=4.0, request_seconds=4.0)
    assert made.scored.tolist() == [True, False, True, True, True]


def test_a_silent_teacher_stops_the_run_at_its_deadline_and_is_named() -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0\.5 s for the teacher large at http.*5 rows"):
        score(Server(lambda ids: 9.0), some_rows(), deadline_seconds=0.5, request_seconds=0.4)


def test_a_dead_teacher_stops_the_run_at_its_deadline() -> None:
    config = TeacherConfig(
        base_url="http://127.0.0.1:9/v1", model="large", deadline_seconds=0.4, request_seconds=0.4
    )
    with pytest.raises(WaitTimeout, match=r"teacher large.*the last try: .*ClientConnectorError"):
        asyncio.run(Teacher(config, 64).score(some_rows()))


@pytest.mark.parametrize("status", [401, 404])
def test_what_every_row_would_be_told_stops_the_run_at_once(status: int) -> None:
    server = Server(lambda ids: status)
    with pytest.raises(RunError, match=f"/completions: status {status}"):
        score(server, some_rows(), concurrency=1)
    assert len(server.bodies) < 5


def test_a_row_sampled_at_another_temperature_is_not_compared() -> None:
    rows = some_rows()
    columns = {"temperature": np.where(rows.row_of_token == 1, 0.7, 1.0).astype(np.float32)}
    made = score(Server(), Rows(rows.ids, rows.lengths, rows.weights, columns))
    assert made.scored.tolist() == [True, False, True, True, True]


def test_no_rows_ask_nothing() -> None:
    server = Server()
    made = score(server, Rows.from_lists([], []))
    assert (len(made.logprobs), made.counts["rows_scored"], server.bodies) == (0, 0.0, [])


# --- before the run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def check(server: Server, folder: Path, model: str = "large", rows: int = 64) -> str:
    async def work(url: str) -> str:
        return await Teacher(TeacherConfig(base_url=url, model=model), rows).check(folder)

    return with_server(server, work)  # type: ignore[no-any-return]


def speaking(folder: Path, server: Server | None = None) -> Server:
    server = server or Server()
    server.words = str(folder / "tokenizer.json")
    return server


def test_a_teacher_of_the_same_tokenizer_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDS_AT_ONCE", 7)
    words = check(speaking(folder), folder)
    assert words.startswith("large at http://127.0.0.1:")
    assert words.endswith("/v1/: the same 50 tokens, rows of up to 4095 tokens")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w47"], vocabulary["w48"] = vocabulary["w48"], vocabulary["w47"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=r"tokens 0 to 49 are '.*w47 w48.*w48 w47.*must share"):
        check(speaking(tmp_path), folder)
    vocabulary.pop("w47")
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="expected the student's tokenizer"):
        check(speaking(tmp_path), folder)


@pytest.mark.parametrize(
    ("server", "options", "words"),
    [
        (Server(), {"model": "small"}, r"expected one of \['large'\], which .*, got 'small'"),
        (Server(most=64), {}, "takes 64 tokens.*max_row_tokens is 64; start it with .* 65"),
        (Server(without(lambda given: None)), {}, "expected prompt_logprobs, got none"),
        (Server(lambda ids: 401), {}, "status 401"),
    ],
)
def test_who_cannot_teach_is_refused(
    server: Server, options: dict[str, Any], words: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(speaking(folder, server), folder, **options)


def test_a_server_that_is_no_vllm_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a vLLM server that answers, got .*/detokenize"
    ):
        check(Server(), folder)


def test_a_teacher_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.3)
    config = TeacherConfig(base_url="http://127.0.0.1:9/v1", model="large")
    with pytest.raises(WaitTimeout, match=r"teacher large at http://127\.0\.0\.1:9/v1 to be check"):
        asyncio.run(Teacher(config, 64).check(folder))


def test_the_ranks_wait_for_longer_than_the_check_so_that_the_teacher_is_named() -> None:
    plain = RunConfig.model_validate({"model": {"path": "m"}})
    with_teacher = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "algorithm": {"name": "opd", "teacher": {"base_url": "http://h/v1", "model": "large"}},
        }
    )
    assert setup_seconds(plain) == START
    assert setup_seconds(with_teacher) == START + module.CHECK_SECONDS
