"""Judging without Ray: cases out of spans, questions asked once, at a pace, again, and in time."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from agl_ray.judge import Bench, Case, JudgedCall, JudgeFailed, Verdict, case_of
from agl_ray.judge.bench import Ask, AskAgain
from agl_ray.judge.functions import asking_function
from agl_ray.tracing import make_tag_attributes
from agl_ray.types import InputError, Rollout


def case(text: str = "a", call_id: str = "c1") -> Case:
    call = JudgedCall(call_id, None, [{"role": "user", "content": text}], {"content": "42"})
    return Case(task={"q": text}, mode="train", reward=None, calls=[call])


def bench(ask: Ask, **options: Any) -> Bench:
    given = {"retries": 2, "timeout_seconds": 5.0, "concurrency": 4, "cache_size": 10}
    return Bench(ask, first_pause=0.001, **{**given, **options})


def test_a_case_has_the_whole_conversations() -> None:
    def row(span_id: str, parent: str | None, first: int, messages: list[str], answer: str) -> Any:
        request = {"messages_from": first, "messages": messages}
        attributes = {"request": request, "response": answer}
        return {
            "kind": "call",
            "span_id": span_id,
            "parent_call": parent,
            "role": "planner",
            "attributes": attributes,
        }

    rows = [
        row("1", None, 0, ["s", "u1"], "a1"),
        {"kind": "span", "attributes": {}},
        row("2", "1", 3, ["u2"], "a2"),
        row(
            "3", "1", 2, ["other"], "a3"
        ),  # a branch: it goes on from the first call, not from the last
    ]
    rollout = Rollout(rollout_id="ro-1", input="task", start_time=0.0, mode="train")
    found = case_of(rollout, rows, 0.5)
    assert [one.messages for one in found.calls] == [
        ["s", "u1"],
        ["s", "u1", "a1", "u2"],
        ["s", "u1", "other"],
    ]
    assert found.messages == ["s", "u1", "other", "a3"]
    assert (found.task, found.reward, found.calls[0].role) == ("task", 0.5, "planner")
    assert case_of(rollout, [], None).messages == []


def test_a_judge_sees_the_tags_of_a_call_and_may_reward_them() -> None:
    metadata = {**make_tag_attributes(["search", "late"]), "user": "u"}
    request = {"messages": ["u1"], "metadata": metadata}
    row = {"kind": "call", "span_id": "1", "parent_call": None, "role": None}
    rollout = Rollout(rollout_id="ro-1", input="task", start_time=0.0)
    found = case_of(rollout, [{**row, "attributes": {"request": request, "response": "a"}}], None)
    assert found.calls[0].tags == ("search", "late")
    plain = {"messages": ["u1"]}
    other = case_of(rollout, [{**row, "attributes": {"request": plain, "response": "a"}}], None)
    assert other.calls[0].tags == ()
    assert other.digest() != found.digest()

    async def ask(one: Case) -> Verdict:
        return Verdict(reward=1.0, tags=dict.fromkeys(one.calls[0].tags, 0.5))

    async def main() -> list[Verdict]:
        judge = bench(ask)
        return [await judge.verdict(found), await judge.verdict(found)]

    assert [one.tags for one in asyncio.run(main())] == [{"search": 0.5, "late": 0.5}] * 2
    for wrong in ({"search": math.nan}, {"": 1.0}):
        with pytest.raises(InputError, match="verdict"):
            Verdict(reward=1.0, tags=wrong)


def test_the_hash_is_of_what_is_judged() -> None:
    assert case("a", "c1").digest() == case("a", "c2").digest()
    assert case("a").digest() != case("b").digest()


def test_the_same_content_is_asked_once_and_calls_keep_their_own_ids() -> None:
    asked: list[str] = []

    async def ask(one: Case) -> Verdict:
        asked.append(one.task["q"])
        await asyncio.sleep(0.01)
        return Verdict(reward=0.5, calls={one.calls[0].call_id: 1.0})

    async def main() -> None:
        judge = bench(ask)
        cases = [case("a", f"c{number}") for number in range(3)]
        verdicts = await asyncio.gather(*(judge.verdict(one) for one in cases))
        verdicts.append(await judge.verdict(case("a", "c3")))
        assert [one.calls for one in verdicts] == [{f"c{number}": 1.0} for number in range(4)]
        assert (asked, judge.asked, judge.remembered) == (["a"], 1, 3)
        none = bench(ask, cache_size=0)
        await asyncio.gather(*(none.verdict(one) for one in cases))
        assert none.asked == 3

    asyncio.run(main())


def test_the_cache_keeps_the_newest() -> None:
    async def ask(one: Case) -> Verdict:
        return Verdict(reward=1.0)

    async def main() -> None:
        judge = bench(ask, cache_size=2)
        for text in ("a", "b", "a", "c", "a", "b"):
            await judge.verdict(case(text))
        assert judge.asked == 4  # b was the oldest when c came

    asyncio.run(main())


def test_a_failure_is_tried_again_and_never_remembered() -> None:
    tries: list[int] = []

    async def ask(one: Case) -> Verdict:
        tries.append(1)
        if len(tries) <= 4:
            raise AskAgain("busy")
        return Verdict(reward=1.0)

    async def main() -> None:
        judge = bench(ask)
        with pytest.raises(JudgeFailed, match="failed 3 times: busy"):
            await judge.verdict(case())
        assert (await judge.verdict(case())).reward == 1.0
        assert (judge.asked, judge.failed) == (5, 1)

    asyncio.run(main())


def test_the_deadline_holds_and_names_the_last_failure() -> None:
    async def ask(one: Case) -> Verdict:
        if one.task["q"] == "slow":
            await asyncio.sleep(30)
        raise AskAgain("status 503", after=30.0)

    async def main() -> None:
        judge = bench(ask, timeout_seconds=0.1)
        for text, why in (("slow", r"\(0.1 s\)$"), ("busy", "last try: status 503")):
            with pytest.raises(JudgeFailed, match=why):
                await judge.verdict(case(text))

    asyncio.run(main())


def test_whoever_goes_away_does_not_take_the_answer_along() -> None:
    async def ask(one: Case) -> Verdict:
        await asyncio.sleep(0.05)
        return Verdict(reward=1.0)

    async def main() -> None:
        judge = bench(ask)
        first = asyncio.create_task(judge.verdict(case()))
        second = asyncio.create_task(judge.verdict(case()))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await second).reward == 1.0

    asyncio.run(main())


def test_concurrency_and_pace_bound_the_questions() -> None:
    open_now, most, times = 0, 0, []

    async def ask(one: Case) -> Verdict:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        times.append(time.monotonic())
        await asyncio.sleep(0.005)
        open_now -= 1
        return Verdict(reward=1.0)

    async def main() -> None:
        judge = bench(ask, concurrency=3)
        await asyncio.gather(*(judge.verdict(case(str(number))) for number in range(12)))
        assert most == 3
        times.clear()
        paced = bench(ask, requests_per_minute=60 / 0.02)
        await asyncio.gather(*(paced.verdict(case(str(number))) for number in range(5)))
        assert times[-1] - times[0] >= 4 * 0.02 * 0.95

    asyncio.run(main())


def judge_with(function: Any, **options: Any) -> Verdict:
    return asyncio.run(bench(asking_function(function, "f"), **options).verdict(case()))


def test_functions_are_called_by_name_in_a_thread_or_as_coroutines() -> None:
    def plain(messages: Any, reward: Any, mode: str, limit: int = 3) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        assert (messages[-1], reward, mode, limit) == ({"content": "42"}, None, "train", 3)
        return np.float32(0.5)

    async def coroutine(task: Any, case: Case) -> Verdict:
        return Verdict(reward=1, dimensions={"style": 0.5}, comment=task["q"])

    assert judge_with(plain) == Verdict(reward=0.5)
    assert judge_with(coroutine) == Verdict(reward=1, dimensions={"style": 0.5}, comment="a")


@pytest.mark.parametrize("said", [None, "1", math.nan, [1.0], {"reward": 1}])
def test_what_is_no_number_is_no_verdict(said: Any) -> None:
    with pytest.raises(JudgeFailed, match=r"failed 1 times: f: InputError: .*finite number"):
        judge_with(lambda task: said, retries=0)


def test_what_goes_wrong_in_a_judge_is_told() -> None:
    def raises(task: Any) -> float:
        raise KeyError("answer")

    with pytest.raises(JudgeFailed, match="f: KeyError: 'answer'"):
        judge_with(raises)
    with pytest.raises(JudgeFailed, match=r"f: RuntimeError: .*sys.exit\(3\)"):
        judge_with(lambda task: sys.exit(3))
    with pytest.raises(JudgeFailed, match="rewarded call 'nobody'"):
        judge_with(lambda task: Verdict(reward=1.0, calls={"nobody": 1.0}))
    with pytest.raises(InputError, match="nothing can be given for its parameter 'answer'"):
        asking_function(lambda answer: 1.0, "f")
    with pytest.raises(InputError, match="expected a function, got 3"):
        asking_function(3, "f")

    async def broken(one: Case) -> Verdict:
        raise OSError("no such thing")

    with pytest.raises(JudgeFailed, match="OSError: no such thing"):
        asyncio.run(bench(broken).verdict(case()))
