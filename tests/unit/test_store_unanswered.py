"""An attempt that ends on an unanswered model call ends `engine_error`, whatever its agent says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.types import (
    UNANSWERED_CALL,
    Attempt,
    EndReason,
    RolloutConfig,
    RolloutStatus,
)


def on_a_store(scenario: Callable[[LightningStore], Awaitable[None]]) -> None:
    async def run() -> None:
        core = await StoreCore.open("memory://")
        await scenario(LightningStore.local(core))
        await core.close()

    asyncio.run(run())


async def attempt_of(store: LightningStore, config: RolloutConfig) -> Attempt:
    await store.enqueue_rollout(1, config=config)
    leased = await store.dequeue_rollout("w")
    assert leased is not None
    return leased.attempt


@pytest.mark.parametrize("said", [EndReason.OK, EndReason.AGENT_ERROR])
def test_the_agents_word_does_not_count(said: EndReason) -> None:
    async def scenario(store: LightningStore) -> None:
        config = RolloutConfig(max_attempts=2, retry_condition=("engine_error",))
        attempt = await attempt_of(store, config)
        key = (attempt.rollout_id, attempt.attempt_id)
        await store.update_attempt(*key, metadata={UNANSWERED_CALL: "the engine was gone"})
        reward = 0.0 if said is EndReason.OK else None
        for _ in range(2):  # a repeated end is the same end
            ended = await store.end_attempt(*key, said, reward=reward)
            assert ended.end_reason is EndReason.ENGINE_ERROR
            assert ended.reward is None
            assert ended.error == "the engine was gone"
        rollout = await store.get_rollout_by_id(attempt.rollout_id)
        assert rollout is not None
        assert rollout.status is RolloutStatus.REQUEUING

    on_a_store(scenario)


def test_a_later_answer_makes_it_good() -> None:
    async def scenario(store: LightningStore) -> None:
        attempt = await attempt_of(store, RolloutConfig())
        key = (attempt.rollout_id, attempt.attempt_id)
        await store.update_attempt(*key, metadata={UNANSWERED_CALL: "the engine was gone"})
        await store.update_attempt(*key, metadata={})
        ended = await store.end_attempt(*key, EndReason.OK, reward=1.0)
        assert (ended.end_reason, ended.reward) == (EndReason.OK, 1.0)

    on_a_store(scenario)


def test_agent_errors_are_not_retried_unless_asked() -> None:
    async def scenario(store: LightningStore) -> None:
        config = RolloutConfig(max_attempts=3, retry_condition=("engine_error", "lost"))
        attempt = await attempt_of(store, config)
        await store.end_attempt(attempt.rollout_id, attempt.attempt_id, EndReason.AGENT_ERROR)
        rollout = await store.get_rollout_by_id(attempt.rollout_id)
        assert rollout is not None
        assert rollout.status is RolloutStatus.FAILED

    on_a_store(scenario)


def test_an_unknown_condition_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'flaky'"):
        RolloutConfig(retry_condition=("flaky",))
