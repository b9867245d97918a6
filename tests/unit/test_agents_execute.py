"""An attempt ends with a reason; only `ok` carries a reward."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

import agl_ray as agl
from agl_ray.agents import Outcome, Place, as_agent, run_agent, settled
from agl_ray.tracing import SpanRecorder, emit_reward
from agl_ray.types import Attempt, AttemptedRollout, EndReason, InputError, Rollout

RESOURCES = {"main_llm": agl.LLM(endpoint="http://127.0.0.1:1", model="m")}


def run(
    agent: Any,
    *,
    timeout: float = 5.0,
    mode: str = "train",
    task: Any = 1,
    place: Place = Place.INLINE,
) -> Outcome:
    attempt = AttemptedRollout(
        rollout=Rollout(
            rollout_id="ro-1", input=task, start_time=0.0, mode=mode, metadata={"step": 3}
        ),
        attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
    )
    recorder = SpanRecorder("ro-1", "at-1")
    work = run_agent(as_agent(agent), attempt, RESOURCES, recorder, timeout, place=place)
    return settled(asyncio.run(work))


def test_the_llm_points_at_the_attempt() -> None:
    seen: list[Any] = []

    @agl.rollout
    async def agent(task: int, llm: agl.LLM, ctx: agl.RolloutContext) -> float:
        seen.extend([task, llm.endpoint, ctx.step])
        return 1

    assert run(agent) == Outcome(reason=EndReason.OK, reward=1.0)
    assert seen == [1, "http://127.0.0.1:1/rollout/ro-1/attempt/at-1/v1", 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", [1.0], object()])
def test_what_is_no_finite_number_is_an_agent_error(value: Any) -> None:
    outcome = run(agl.rollout(lambda task: value))
    assert outcome.reason is EndReason.AGENT_ERROR
    assert outcome.reward is None
    assert repr(value) in (outcome.error or "")


def test_none_takes_the_last_emitted_reward() -> None:
    @agl.rollout
    def agent(task: int) -> None:
        emit_reward(0.25)
        emit_reward(0.75)

    assert run(agent) == Outcome(reason=EndReason.OK, reward=0.75)


def test_none_without_a_reward_is_an_agent_error() -> None:
    outcome = run(agl.rollout(lambda task: None))
    assert outcome.reason is EndReason.AGENT_ERROR
    assert "emit_reward" in (outcome.error or "")


def test_raising_and_exiting_are_agent_errors_that_say_where() -> None:
    def raises(task: int) -> float:
        raise KeyError("question")

    def exits(task: int) -> float:
        raise SystemExit(3)

    assert "test_agents_execute.py" in (run(raises).error or "")
    for agent, text in ((raises, "KeyError: 'question'"), (exits, "sys.exit(3)")):
        outcome = run(agent)
        assert outcome.reason is EndReason.AGENT_ERROR
        assert text in (outcome.error or "")


def test_environment_failure_has_its_own_reason() -> None:
    async def agent(task: int) -> float:
        raise agl.EnvironmentFailure("the sandbox is gone")

    assert run(agent).reason is EndReason.ENV_ERROR


@pytest.mark.parametrize(
    ("url", "status", "reason"),
    [
        ("http://h/rollout/ro-1/attempt/at-1/v1/chat/completions", None, EndReason.ENGINE_ERROR),
        ("http://h/rollout/ro-1/attempt/at-1/v1/chat/completions", 503, EndReason.ENGINE_ERROR),
        ("http://h/rollout/ro-1/attempt/at-1/v1/chat/completions", 400, EndReason.AGENT_ERROR),
        ("http://shop.example/api", None, EndReason.AGENT_ERROR),
    ],
)
def test_a_call_without_an_answer_is_the_engines_fault(
    url: str, status: int | None, reason: EndReason
) -> None:

    class ApiError(Exception):
        """As OpenAI's client raises it: with the request, and a status where there was an answer."""

        request = httpx.Request("POST", url)
        status_code = status

    async def agent(task: int) -> float:
        try:
            raise ApiError("no answer")
        except ApiError as error:
            raise RuntimeError("the agent gave up") from error

    assert run(agent).reason is reason


def test_a_deadline_stops_a_coroutine() -> None:
    went_on: list[int] = []

    async def agent(task: int) -> float:
        await asyncio.sleep(5)
        went_on.append(1)
        return 1.0

    assert run(agent, timeout=0.05).reason is EndReason.TIMEOUT
    assert not went_on


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("late", [False, True])
def test_tasks_that_an_agent_has_begun_end_with_its_attempt(place: Place, late: bool) -> None:
    begun: list[asyncio.Task[Any]] = []

    async def agent(task: int) -> float:
        begun.append(asyncio.create_task(asyncio.sleep(60)))
        await asyncio.sleep(60 if late else 0)
        return 1.0

    async def main() -> Outcome:
        attempt = AttemptedRollout(
            rollout=Rollout(rollout_id="ro-1", input=1, start_time=0.0),
            attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
        )
        recorder = SpanRecorder("ro-1", "at-1")
        given = (as_agent(agent), attempt, RESOURCES, recorder, 0.1 if late else 5.0)
        outcome = await run_agent(*given, place=place)
        assert begun[0].cancelled()
        return outcome

    outcome = asyncio.run(main())
    assert outcome.reason is (EndReason.TIMEOUT if late else EndReason.OK)
    assert "cannot be stopped" not in (outcome.error or "")


def test_a_plain_function_does_not_block_the_loop() -> None:
    """Two sleeping agents at once take the time of one: each waits for the other inside its thread."""
    import threading

    barrier = threading.Barrier(2, timeout=60)

    @agl.rollout
    def agent(task: int) -> float:
        barrier.wait()
        time.sleep(0)
        return 1.0

    async def both() -> list[Outcome]:
        attempt = AttemptedRollout(
            rollout=Rollout(rollout_id="ro-1", input=1, start_time=0.0),
            attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
        )
        runs = [
            run_agent(agent, attempt, RESOURCES, SpanRecorder("ro-1", "at-1"), 5.0)
            for _ in range(2)
        ]
        return list(await asyncio.gather(*runs))

    assert [outcome.reason for outcome in asyncio.run(both())] == [EndReason.OK, EndReason.OK]


def test_a_class_agent_is_fresh_for_every_rollout_and_picks_its_mode() -> None:
    class Agent(agl.LitAgent):
        seen = 0

        def training_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            self.seen += 1
            return float(self.seen)

        async def validation_rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 9.0

    agent = Agent()
    assert [run(agent).reward, run(agent).reward] == [1.0, 1.0]
    assert run(agent, mode="val").reward == 9.0


def test_a_parameter_that_cannot_be_injected_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'database'"):

        @agl.rollout
        def agent(task: int, database: Any) -> float:
            return 1.0
