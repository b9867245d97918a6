"""Writing spans: their numbers, their identity, what they do to their attempt."""

from __future__ import annotations

import asyncio
import time

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptStatus, EndReason, InputError, NotFound, RolloutConfig
from store_catalogue.common import (
    Restart,
    a_batch,
    a_span,
    end_ok,
    key_of,
    queued,
    status_of,
    taken,
)


async def numbers_go_on_over_all_attempts_of_a_rollout(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=("failed",))
    await queued(store, 1, config=config)
    first = await taken(store)
    assert await store.add_spans(*key_of(first), a_batch(first, "a", "b")) == [1, 2]
    await store.end_attempt(*key_of(first), EndReason.AGENT_ERROR)
    second = await taken(store)
    stored = await store.add_span(a_span(second, "c"))
    assert stored is not None
    assert stored.sequence_id == 3
    other = await store.start_rollout(2)
    stored = await store.add_span(a_span(other, "c"))
    assert stored is not None
    assert stored.sequence_id == 1


async def a_span_comes_back_as_it_was_stored(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    given = a_span(
        attempt,
        "00f067aa0ba902b7",
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        parent_id="00f067aa0ba90200",
        name="openai.chat.completion",
        kind="reward",
        status="ERROR",
        status_message="it broke",
        attributes={"a": 1, "b": "x", "c": [1.5, None], "d": {"e": True}},
        events=[{"name": "event", "time_ns": 5}],
        links=[{"span_id": "x"}],
        resource={"service": "agent"},
        start_time=1700000000.25,
        end_time=1700000001.5,
        extra={"reward": 0.5, "reward_dimension": "primary", "role": "solver"},
    )
    stored = await store.add_span(given)
    assert stored is not None
    (found,) = await store.query_spans(attempt.rollout_id)
    assert found == stored
    assert stored == type(given)(**{**_fields(given), "sequence_id": 1})


def _fields(span: object) -> dict[str, object]:
    return {name: getattr(span, name) for name in span.__struct_fields__}  # type: ignore[attr-defined]


async def a_span_needs_only_its_name(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    before = time.time()
    stored = await store.add_span(a_span(attempt, name="bare", start_time=None, end_time=None))
    assert stored is not None
    assert stored.span_id
    assert stored.start_time is not None
    assert before - 1 < stored.start_time < time.time() + 1
    assert stored.end_time == stored.start_time
    assert list(await store.query_spans(attempt.rollout_id)) == [stored]


async def many_spans_of_several_attempts_keep_their_order(store: LightningStore) -> None:
    one, two = await store.start_rollout(1), await store.start_rollout(2)
    again = await store.start_attempt(one.rollout_id)
    spans = [a_span(one, "a"), a_span(two, "b"), a_span(again, "c"), a_span(one, "d")]
    stored = await store.add_many_spans(spans)
    assert [(span.span_id, span.sequence_id) for span in stored] == [
        *(("a", stored[0].sequence_id), ("b", 1)),
        *(("c", stored[2].sequence_id), ("d", stored[3].sequence_id)),
    ]
    assert {one.sequence_id for one in (stored[0], stored[2], stored[3])} == {1, 2, 3}
    first = await store.query_spans(one.rollout_id, one.attempt_id)
    assert [span.span_id for span in first] == ["a", "d"]
    assert await store.add_many_spans([]) == []


async def an_explicit_number_is_kept_and_pushes_the_counter(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    numbers = []
    for given in (None, 7, None, 3, None, 20, 21, None):
        stored = await store.add_span(a_span(attempt, sequence_id=given))
        assert stored is not None
        numbers.append(stored.sequence_id)
    assert numbers == [1, 7, 8, 3, 9, 20, 21, 22]
    found = [one.sequence_id for one in await store.query_spans(attempt.rollout_id)]
    assert found == sorted(numbers)
    assert await store.get_next_span_sequence_id(*key_of(attempt)) == 23
    with pytest.raises(InputError, match="sequence_id"):
        await store.add_span(a_span(attempt, sequence_id=-1))


async def several_spans_may_share_a_number(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    number = await store.get_next_span_sequence_id(*key_of(attempt))
    spans = [a_span(attempt, name, sequence_id=number) for name in "abc"]
    assert len(await store.add_many_spans(spans)) == 3
    found = await store.query_spans(attempt.rollout_id)
    assert [(one.span_id, one.sequence_id) for one in found] == [(name, number) for name in "abc"]


async def mixed_bulk_numbers(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    spans = [a_span(attempt, str(i), sequence_id=n) for i, n in enumerate([None, 10, 11, None, 5])]
    stored = await store.add_many_spans(spans)
    assert [one.sequence_id for one in stored] == [1, 10, 11, 12, 5]


async def numbers_are_handed_out_ahead(store: LightningStore) -> None:
    one, two = await store.start_rollout(1), await store.start_rollout(2)
    assert await store.get_next_span_sequence_id(*key_of(one)) == 1
    pairs = [key_of(one), key_of(two), key_of(one)]
    assert await store.get_many_span_sequence_ids(pairs) == [2, 1, 3]
    stored = await store.add_span(a_span(one))
    assert stored is not None
    assert stored.sequence_id == 4
    assert await store.get_many_span_sequence_ids([]) == []
    with pytest.raises(NotFound, match="ro-none"):
        await store.get_next_span_sequence_id("ro-none", "at-none")


async def numbers_handed_out_survive_a_restart(store: LightningStore, restart: Restart) -> None:
    attempt = await store.start_rollout(1)
    await store.add_span(a_span(attempt, "a"))
    assert await store.get_many_span_sequence_ids([key_of(attempt)] * 3) == [2, 3, 4]
    store = await restart()
    assert await store.get_next_span_sequence_id(*key_of(attempt)) == 5
    stored = await store.add_span(a_span(attempt, "b", sequence_id=2))
    assert stored is not None
    assert await store.add_span(a_span(attempt, "a")) is None
    assert await store.get_next_span_sequence_id(*key_of(attempt)) == 6


async def thirty_at_the_same_time_are_thirty_numbers(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    stored = await asyncio.gather(*(store.add_span(a_span(attempt, f"s{i}")) for i in range(30)))
    assert sorted(one.sequence_id or 0 for one in stored if one is not None) == list(range(1, 31))
    numbers = await asyncio.gather(
        *(store.get_next_span_sequence_id(*key_of(attempt)) for _ in range(30))
    )
    assert sorted(numbers) == list(range(31, 61))


async def a_known_span_is_none_and_stored_once(store: LightningStore) -> None:
    attempt, other = await store.start_rollout(1), await store.start_rollout(2)
    assert await store.add_span(a_span(attempt, "a")) is not None
    assert await store.add_span(a_span(attempt, "a", name="again")) is None
    assert await store.add_span(a_span(other, "a")) is not None
    again = await store.start_attempt(attempt.rollout_id)
    assert await store.add_span(a_span(again, "a")) is not None
    (found,) = await store.query_spans(*key_of(attempt))
    assert found.name == "a"


async def known_spans_are_left_out_of_many(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await store.add_span(a_span(attempt, "a"))
    names = ["b", "a", "c", "b"]
    stored = await store.add_many_spans([a_span(attempt, name) for name in names])
    assert [one.span_id for one in stored] == ["b", "c"]
    assert await store.add_many_spans([a_span(attempt, name) for name in "cba"]) == []
    (late,) = await store.add_many_spans([a_span(attempt, name) for name in "cd"])
    assert late.span_id == "d"
    assert await store.add_span(a_span(attempt, "c")) is None
    found = await store.query_spans(attempt.rollout_id)
    assert [one.span_id for one in found] == ["a", "b", "c", "d"]
    assert [one.sequence_id for one in found] == [1, 2, 3, 4]


async def spans_are_known_after_the_end_too(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await store.add_many_spans([a_span(attempt, name) for name in "abc"])
    await end_ok(store, attempt)
    assert await store.add_span(a_span(attempt, "b")) is None
    stored = await store.add_many_spans([a_span(attempt, name) for name in "cde"])
    assert [one.span_id for one in stored] == ["d", "e"]
    assert await store.add_span(a_span(attempt, "e")) is None
    assert len(await store.query_spans(attempt.rollout_id)) == 5


async def the_first_span_lets_attempt_and_rollout_run(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    assert attempt.attempt.last_heartbeat_time is None
    await store.add_span(a_span(attempt, "a"))
    first = await store.get_attempt(*key_of(attempt))
    assert first.status is AttemptStatus.RUNNING
    assert await status_of(store, attempt.rollout_id) == "running"
    assert first.last_heartbeat_time is not None
    await store.add_span(a_span(attempt, "b"))
    second = await store.get_attempt(*key_of(attempt))
    assert (second.last_heartbeat_time or 0) >= first.last_heartbeat_time
    assert second.num_spans == 2


async def spans_of_unknown_attempts_are_refused(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    wrong = a_span(attempt)
    fields = {**_fields(wrong), "attempt_id": "at-none"}
    with pytest.raises(NotFound, match="at-none"):
        await store.add_span(type(wrong)(**fields))  # type: ignore[arg-type]
    fields = {**_fields(wrong), "rollout_id": "ro-none"}
    with pytest.raises(ValueError, match="ro-none"):
        await store.add_many_spans([type(wrong)(**fields)])  # type: ignore[arg-type]


async def wrong_spans_are_refused_by_name(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    for wrong in (
        {"status": "FINE"},
        {"kind": "tool"},
        {"extra": {"colour": 1}},
        {"attributes": {"a": object()}},
        {"span_id": "a,b"},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            await store.add_span(a_span(attempt, **wrong))  # type: ignore[arg-type]
    assert list(await store.query_spans(attempt.rollout_id)) == []
