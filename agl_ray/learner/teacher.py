"""The teacher of on-policy distillation: a vLLM server that says how likely it finds the student's own tokens. `algorithm.teacher`.

    POST {base_url}/completions {"model", "prompt": [ids], "max_tokens": 1, "prompt_logprobs": 0}
    -> choices[0].prompt_logprobs = [null, {"ID": {"logprob": ...}}, ...], one entry per token

Called by actors/learner.py on rank 0: `check` when the learner starts, `score` for the rows of each step (learner/prepare.py). A row that it
cannot score is left out and counted, never given an advantage of 0; a teacher that scores less than `min_scored` of a step's rows within its
deadline ends the run. Nothing of it is kept between steps. Test it alone: tests/unit/test_learner_teacher.py (a real HTTP server). Legend: R rows, N tokens.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec
import numpy as np

from agl_ray.config.teacher import TeacherConfig
from agl_ray.trajectory.ragged import Array, Rows
from agl_ray.types.errors import ConfigError, RunError, WaitTimeout
from agl_ray.waits import wait

log = logging.getLogger(__name__)
T = TypeVar("T")

PASSING = (408, 409, 425, 429)  # besides 500 and above
HOPELESS = (401, 403, 404)  # the same for every row
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between tries
CHECK_SECONDS = 120.0
IDS_AT_ONCE = 4096  # of the vocabulary, in one question
HIGHEST = 1e-3  # of a log-probability, for rounding; a server that gives logits is above it


class Scores(NamedTuple):
    """logprobs: float32 [N], the teacher's of every trained token, 0 elsewhere. scored: bool [R]; where it is False the logprobs mean nothing.
    counts: metrics of the step."""

    logprobs: Array
    scored: Array
    counts: dict[str, float]


class Unscored(Exception):
    """There are no log-probabilities of this row; another row may have some."""


class _Again(Exception):
    """A question failed in a way that may pass. reached: by a server that answered, or should have."""

    def __init__(self, why: str, *, reached: bool) -> None:
        super().__init__(why)
        self.reached = reached


class _Of(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Of] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Text(msgspec.Struct):
    prompt: str


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class Teacher:
    """max_row_tokens: of the student's rows, `learner.max_row_tokens`. ConfigError where its key is not in the environment.

    Its methods are for any event loop; each opens its own connections.
    """

    def __init__(self, config: TeacherConfig, max_row_tokens: int) -> None:
        self.config, self.max_row_tokens = config, max_row_tokens
        self._key = config.key()
        self._retries = 0
        self._last = "no answer"

    # --- before the run ------------------------------------------------------------------------

    async def check(self, model_path: Path) -> str:
        """What it is, in words. ConfigError where it has not the model, the room for a row, prompt log-probabilities or the
        tokenizer of `model_path`; WaitTimeout where it does not answer."""
        async with self._server() as server:
            return await self._within(
                self._checked(server, model_path), "to be checked", CHECK_SECONDS
            )

    async def _checked(self, server: _Server, model_path: Path) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        try:
            room = await self._room(server)
            number = await self._same_tokens(server, tokenizer)
            await self._answer(lambda: self._ask(server, [0, 0], [1]))
        except (Unscored, RunError) as error:
            raise ConfigError(
                f"algorithm.teacher: expected a vLLM server that answers, got {error}"
            ) from error
        return f"{self.config.model} at {self.config.base_url}: the same {number} tokens, rows of up to {room}"

    async def _room(self, server: _Server) -> str:
        """Most tokens of a row there, in words."""
        url = f"{self.config.base_url.rstrip('/')}/models"
        found = {one.id: one for one in (await self._answer(lambda: server.get(url))).data}
        if self.config.model not in found:
            raise ConfigError(
                f"algorithm.teacher.model: expected one of {sorted(found)}, which {url} has, got {self.config.model!r}"
            )
        most = found[self.config.model].max_model_len
        if most is None:
            return "any number"
        if most <= self.max_row_tokens:
            raise ConfigError(
                f"algorithm.teacher: {self.config.model} takes {most} tokens, one of them its answer's, and learner.max_row_tokens is "
                f"{self.max_row_tokens}; start it with --max-model-len {self.max_row_tokens + 1}, or lower learner.max_row_tokens"
            )
        return f"{most - 1} tokens"

    async def _same_tokens(self, server: _Server, tokenizer: Any) -> int:
        """The number of the student's tokens, every one of which must be the same text there."""
        number = len(tokenizer)
        url = f"{self.config.root}/detokenize"
        for start in range(0, number, IDS_AT_ONCE):
            ids = range(start, min(start + IDS_AT_ONCE, number))
            body = {"model": self.config.model, "tokens": [*ids]}
            here, there = tokenizer.decode([*ids]), await self._text(server, url, body)
            if there != here:
                at = next(
                    (
                        i
                        for i, pair in enumerate(zip(here, there, strict=False))
                        if len({*pair}) > 1
                    ),
                    min(len(here), len(there)),
                )
                raise ConfigError(
                    f"algorithm.teacher.model {self.config.model}: expected the student's tokenizer, but tokens {ids[0]} to {ids[-1]} are "
                    f"{_around(here, at)} for the student and {_around(there, at)} there; a teacher must share the student's vocabulary"
                )
        return number

    async def _text(self, server: _Server, url: str, body: dict[str, Any]) -> str:
        return (await self._answer(lambda: server.post(url, body, _Text))).prompt

    # --- a step --------------------------------------------------------------------------------

    async def score(self, rows: Rows) -> Scores:
        """Of all rows, as many at once as `concurrency` says. RunError where it refuses every row for the same reason (key, model) or scores too few."""
        started, self._retries, self._last = time.perf_counter(), 0, "no answer"
        logprobs = np.zeros(len(rows.ids), np.float32)
        scored = np.zeros(len(rows), np.bool_)
        async with self._server() as server:
            asking = self._all(server, rows, logprobs, scored)
            what = f"to score {len(rows)} rows"
            try:
                await self._within(asking, what, self.config.deadline_seconds)
            except WaitTimeout as error:
                if not scored.any():
                    raise
                self._last = str(error)
        self._enough(scored)
        lost = rows.weights[~scored[rows.row_of_token]]
        return Scores(
            logprobs,
            scored,
            {
                "rows_scored": float(scored.sum()),
                "rows_dropped_unscored": float((~scored).sum()),
                "tokens_dropped_unscored": float((lost != 0).sum()),
                "teacher_retries": float(self._retries),
                "seconds_teacher": time.perf_counter() - started,
            },
        )

    async def _all(self, server: _Server, rows: Rows, logprobs: Array, scored: Array) -> None:
        starts, temperature = rows.starts, rows.columns.get("temperature")

        async def one(row: int) -> None:
            begin, end = int(starts[row]), int(starts[row] + rows.lengths[row])
            trained = np.flatnonzero(rows.weights[begin:end])
            try:
                if temperature is not None and (temperature[begin:end][trained] != 1).any():
                    raise Unscored(f"row {row} was not sampled at temperature 1")
                ids = rows.ids[begin:end].tolist()
                found = await self._answer(lambda: self._ask(server, ids, trained.tolist()))
            except Unscored as error:
                self._last = str(error)
                return
            logprobs[begin + trained] = found
            scored[row] = True

        async with asyncio.TaskGroup() as tasks:
            for row in range(len(rows)):
                tasks.create_task(one(row))

    def _enough(self, scored: Array) -> None:
        """RunError where too few rows have been scored; a warning where not all are."""
        missing = int((~scored).sum())
        if not missing:
            return
        why = f"the teacher {self.config.model} did not score {missing} of {len(scored)} rows; the last one: {self._last}"
        if not scored.any() or scored.mean() < self.config.min_scored:
            raise RunError(f"{why} (algorithm.teacher.min_scored {self.config.min_scored:g})")
        log.warning("%s; they are dropped", why)

    async def _ask(self, server: _Server, ids: Sequence[int], places: Sequence[int]) -> Array:
        """float32: the log-probabilities of the tokens at `places` of a row of `ids`."""
        body = {
            "model": self.config.model,
            "prompt": ids,
            "max_tokens": 1,
            "prompt_logprobs": 0,
        }
        url = f"{self.config.base_url.rstrip('/')}/completions"
        return _logprobs_in(await server.post(url, body, _Completion), ids, places)

    # --- asking --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[_Server]:
        headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
        async with aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),  # _Server has the deadline
            connector=aiohttp.TCPConnector(limit=self.config.concurrency),
        ) as session:
            yield _Server(session, self.config)

    async def _within(self, work: Awaitable[T], what: str, seconds: float) -> T:
        on = f"the teacher {self.config.model} at {self.config.base_url} {what}"
        try:
            return await wait(work, on=on, seconds=seconds)
        except WaitTimeout as error:
            raise WaitTimeout(on, seconds, f"the last try: {self._last}") from error
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _answer(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives, tried again as long as that may help. Unscored after too many tries; whoever calls has the deadline."""
        failed, pause = 0, FIRST_PAUSE
        while True:
            try:
                return await ask()
            except _Again as error:
                self._last = str(error)
                failed += error.reached
                if failed > self.config.retries:
                    raise Unscored(f"it failed {failed} times: {error}") from error
            self._retries += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


class _Server:
    """One session of HTTP: questions out, typed answers in."""

    def __init__(self, session: aiohttp.ClientSession, config: TeacherConfig) -> None:
        self._session, self._config = session, config
        self._places = asyncio.Semaphore(config.concurrency)

    async def get(self, url: str) -> _Models:
        return await self._send("GET", url, None, _Models)

    async def post(self, url: str, body: dict[str, Any], form: type[T]) -> T:
        return await self._send("POST", url, body, form)

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, form: type[T]) -> T:
        """_Again where another try may help, Unscored where the server refuses this question, RunError where it would refuse each."""
        async with self._places:
            try:
                raw = await wait(
                    self._raw(method, url, body), on=url, seconds=self._config.request_seconds
                )
            except WaitTimeout as error:
                raise _Again(str(error), reached=True) from error
            except aiohttp.ClientError as error:
                raise _Again(f"{url}: {type(error).__name__}: {error}", reached=False) from error
        try:
            return msgspec.json.decode(raw, type=form)
        except msgspec.MsgspecError as error:
            raise Unscored(f"{url}: {error}; got {raw[:200]!r}") from error

    async def _raw(self, method: str, url: str, body: dict[str, Any] | None) -> bytes:
        async with self._session.request(method, url, json=body) as answer:
            raw = await answer.read()
        if answer.status < 400:
            return raw
        why = f"{url}: status {answer.status}: {raw[:200].decode(errors='replace')}"
        if answer.status in HOPELESS:
            raise RunError(why)
        if answer.status in PASSING or answer.status >= 500:
            raise _Again(why, reached=True)
        raise Unscored(why)


def _logprobs_in(answer: _Completion, ids: Sequence[int], places: Sequence[int]) -> Array:
    """float32, of the tokens at `places`; Unscored says what is wrong with the answer."""
    given = answer.choices[0].prompt_logprobs if answer.choices else None
    if given is None:
        raise Unscored("expected prompt_logprobs, got none")
    if len(given) != len(ids):
        raise Unscored(f"expected prompt_logprobs of {len(ids)} tokens, got {len(given)}")
    found = np.zeros(len(places), np.float32)
    for i, place in enumerate(places):
        entry = (given[place] or {}).get(str(ids[place]))
        if entry is None:
            raise Unscored(
                f"token {place}: expected the log-probability of id {ids[place]}, got none"
            )
        if not -np.inf < entry.logprob <= HIGHEST:
            raise Unscored(f"token {place}: expected a log-probability, got {entry.logprob}")
        found[i] = entry.logprob
    return found


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 8) : at + 8])
