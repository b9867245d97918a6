"""Hooks around a rollout, a Hook's and the agent's own, as agent-lightning 0.3 writes them; what agents know of themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_agents_isolation import attempts_of

import agl_ray as agl
from agl_ray.agents import Hook, as_agent
from agl_ray.trainer import Trainer
from agl_ray.types import InputError


class Watching(Hook):
    """Writes what it is told into a file, since it may run in another process."""

    def __init__(self, file: Path, fails: str = "") -> None:
        self.file, self.fails = file, fails

    def note(self, name: str, *more: Any) -> None:
        with self.file.open("a") as file:
            print(name, *more, file=file)
        if name == self.fails:
            raise KeyError(f"hook {name}")

    async def on_rollout_start(self, *, agent: Any, runner: Any, rollout: Any) -> None:
        self.note("rollout_start", runner.get_worker_id(), rollout.input["do"])

    def on_trace_start(self, *, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        self.note("trace_start")

    async def on_trace_end(self, *, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        self.note("trace_end")
        if rollout.input.get("late"):
            agl.emit_reward(0.25)

    async def on_rollout_end(self, *, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        self.note("rollout_end", runner.outcome.reason, [span.extra["reward"] for span in spans])


@agl.rollout
async def emits(task: Any, ctx: agl.RolloutContext) -> None:
    if task["do"] == "raise":
        raise ValueError("bad")
    if not task.get("late"):
        agl.emit_reward(1.0)


class OwnHooks(agl.LitAgent):
    """0.3's methods of an agent."""

    def on_rollout_start(self, task: Any, runner: Any, tracer: Any) -> None:
        self.ready = task.rollout_id

    def training_rollout(self, task: Any, resources: Any, rollout: Any, ctx: Any) -> float:
        (ctx.artifacts / "note").write_text(ctx.mode)
        ctx.logger.warning("working")
        return float(self.ready == rollout.rollout_id)

    def on_rollout_end(self, task: Any, rollout: Any, runner: Any, tracer: Any) -> None:
        (runner.ctx.artifacts / "end").write_text(str(runner.outcome.reward))


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_hooks_come_in_their_order(isolation: str, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    attempts, _ = asyncio.run(
        attempts_of([{"do": "emit"}], isolation, agent=emits, hooks=(Watching(file),))
    )
    assert attempts[0].reward == 1.0
    assert file.read_text().splitlines() == [
        "rollout_start runner-1 emit",
        "trace_start",
        "trace_end",
        "rollout_end ok [1.0]",
    ]


def test_after_an_exception_only_the_last_hook_is_called(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    tasks = [{"do": "raise"}]
    attempts, _ = asyncio.run(attempts_of(tasks, "inline", agent=emits, hooks=(Watching(file),)))
    assert attempts[0].end_reason == "agent_error"
    assert file.read_text().splitlines()[-1] == "rollout_end agent_error []"
    assert "trace_end" not in file.read_text()


def test_a_hook_may_give_the_reward(tmp_path: Path) -> None:
    hooks = (Watching(tmp_path / "notes"),)
    tasks = [{"do": "emit", "late": True}]
    attempts, _ = asyncio.run(attempts_of(tasks, "inline", agent=emits, hooks=hooks))
    assert attempts[0].reward == 0.25


@pytest.mark.parametrize("name", ["rollout_start", "trace_start", "trace_end", "rollout_end"])
def test_a_hook_that_fails_ends_the_attempt_as_an_error(name: str, tmp_path: Path) -> None:
    hooks = (Watching(tmp_path / "notes", fails=name),)
    attempts, _ = asyncio.run(attempts_of([{"do": "emit"}], "inline", agent=emits, hooks=hooks))
    assert (attempts[0].end_reason, attempts[0].reward) == ("agent_error", None)
    assert f"hook {name}" in (attempts[0].error or "")


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_the_agents_own_hooks_and_context(
    isolation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts, spans = asyncio.run(attempts_of([{}], isolation, agent=OwnHooks(), folder=tmp_path))
    assert attempts[0].reward == 1.0
    folder = tmp_path / attempts[0].rollout_id / attempts[0].attempt_id
    assert (folder / "note").read_text() == "train"
    assert (folder / "end").read_text() == "1.0"
    where = attempts[0].rollout_id + "/" + attempts[0].attempt_id + ": working"
    said = caplog.text if isolation == "inline" else spans[0][0]["attributes"]["tail"]
    assert where in said


def test_every_rollout_has_a_copy_down_to_its_lists_unless_the_agent_is_stateless() -> None:
    class Remembers(agl.LitAgent):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            self.seen.append(1)
            return float(len(self.seen))

    class Stateless(Remembers):
        stateless = True

    fresh, _ = asyncio.run(attempts_of([{}] * 3, "inline", agent=Remembers()))
    assert [one.reward for one in fresh] == [1.0] * 3
    shared, _ = asyncio.run(attempts_of([{}] * 3, "inline", agent=Stateless()))
    assert sorted(one.reward or 0 for one in shared) == [1.0, 2.0, 3.0]


def test_an_agent_that_cannot_be_copied_is_refused_at_once() -> None:
    import threading

    class Locked(agl.LitAgent):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    with pytest.raises(InputError, match="stateless = True"):
        as_agent(Locked())


def test_what_is_no_hook_is_refused() -> None:
    with pytest.raises(InputError, match="hooks: expected objects"):
        Trainer(None, hooks=[print])  # type: ignore[arg-type,list-item]


def test_methods_of_the_base_class_can_be_called_as_in_0_3() -> None:
    class Both(agl.LitAgent):
        def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

        def validation_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1 + float(self.training_rollout(task, resources, rollout))

    agent = Both()
    assert agent.method_for("train") == agent.rollout
    assert agent.method_for("val")(1, {}, None) == 2.0


def test_the_decorators_of_0_3_want_their_parameter() -> None:
    with pytest.raises(InputError, match="'llm'"):
        agl.llm_rollout(lambda task: 1.0)
    with pytest.raises(InputError, match="'prompt_template'"):
        agl.prompt_rollout(lambda task, llm: 1.0)
