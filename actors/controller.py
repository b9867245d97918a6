"""Controller: the algorithm's loops around store, runners, learner and weight sync. Holds ids, rewards and counts only.

    rows --enqueue--> [store] --lease--> [runners] --calls--> [gateway, engine]
                         |                                        ^
      finished groups    v                                        | weights, version b+1
    [feeder] ==slots==> [windowed queue] ==batches==> [trainer] --+--> [learner ranks]
    [pool] keeps the runners alive                [ledger] position of the run, in the store

    loop      consumes                    produces                     waits for                     unblocked by
    feeder    free slots of the window    groups of ok attempts        every rollout of a group      the store: the last of them is final
    trainer   batches of P groups         weight versions, metrics     the batch; the learner; sync  the feeder; Ray; the engines' checksums
    pool      deaths of runners           new runners                  a runner's end                Ray

The journal of a step is written before it is trained (`step/<k>`: which attempts, which rewards), so whatever dies, the weights of version
k can be made again from the last checkpoint and the stored attempts: a dead learner rank, a dead controller and `--resume` all take
that one road (`actors.learner_keeper`). With it goes the place in the rows: those of batches that are not journalled yet
are handed out again. The feeder is `actors.batch_feeder`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.batch_feeder import BatchFeeder
from actors.learner_group import LearnerGroup
from actors.learner_keeper import LearnerKeeper, step_key
from actors.restart_watch import RestartWatch
from actors.rollout_groups import GroupRollouts
from actors.run_events import RunEvents
from actors.run_metrics import RunMetrics
from actors.runner_pools import RunnerPools
from agl_ray.agents import NO_HOST, Hook, Host, LitAgent
from agl_ray.config import RunConfig
from agl_ray.config.roles import role_models
from agl_ray.ops.events import Event, Notice, Phase, Progress, StepDone
from agl_ray.ops.ledger import Evaluation, Ledger
from agl_ray.ops.log import setup_logging
from agl_ray.schedule import RowPositions
from agl_ray.store import LightningStore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import LLM, RolloutStatus, RunError, from_json, replace, to_json
from agl_ray.waits import wait

MODEL_NAME = "main"
POSITION = "run/position"


class Controller:
    """One run. `boot` makes the learner and the first weights, `run` trains, `events` tells, `stop` ends.

    config: RunConfig as a dictionary. agent: a LitAgent or its import string (with `base`). writer_keys: of the driver, for W&B and MLflow.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        namespace: str,
        run_folder: str,
        base: str,
        model_path: str,
        agent: LitAgent | str,
        hooks: tuple[Hook, ...] = (),
        host: Host = NO_HOST,
        api_key: str | None = None,
        writer_keys: dict[str, str] | None = None,
    ) -> None:
        self.config = RunConfig.model_validate(config)
        self.namespace, self.base, self.model_path = namespace, base, model_path
        self.folder = Path(run_folder)
        setup_logging(self.folder, process="controller", console=None)
        self.agent, self.hooks, self.host = agent, hooks, host
        self._api_key = api_key  # of the gateway
        self.rows: list[Any] = []
        self.held_out: list[Any] = []
        self.store = LightningStore.connect("store", namespace=namespace)
        self.sync: ActorHandle = ray.get_actor("weight_sync", namespace=namespace)
        self.ledger = Ledger()
        self._said = RunEvents(lambda notice: self.ledger.note(notice.text, notice.restarted))
        self.learners = LearnerKeeper(
            LearnerGroup(self.config, model_path, namespace, self.folder, base),
            self.store,
            self.sync,
            lambda: self.ledger,
            self._said.notice,
        )
        self._watch = RestartWatch(self.store, self.sync, self._said)
        self.metrics = RunMetrics(self.config, self.folder, self._said, writer_keys or {})
        self._body: asyncio.Task[dict[str, Any]] | None = None
        self._failures: dict[str, int] = {}
        self._counted_until = time.time()

    async def ping(self) -> str:
        return "controller"

    # What the person sees ------------------------------------------------------------------------

    async def events(self, cursor: int, wait_seconds: float) -> list[Event]:
        """The events from number `cursor` on; waits up to `wait_seconds` for the first of them."""
        return await self._said.since(cursor, wait_seconds)

    async def _phase(self, name: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Await `work` as a named phase: told at start and end, its seconds booked under `name`."""
        await self._said.tell(Phase(name=name, state="start"))
        started = time.monotonic()
        try:
            return await work
        finally:
            seconds = time.monotonic() - started
            self.ledger.book(name, seconds)
            await self._said.tell(Phase(name=name, state="end", seconds=seconds))

    # Setting up -----------------------------------------------------------------------------------

    async def boot(self, rows: list[ray.ObjectRef]) -> int:
        """Learner up, weights of the run's position staged and in the engines; returns that version.

        rows: refs of the training rows and of the held-out rows, owned by the driver. Runs beside the start of the engines: each of them waits for these first weights before it serves.
        """
        self.rows, self.held_out = await wait(
            asyncio.gather(*rows), on="the driver's rows", seconds=120
        )
        saved = await self.store.get_state(POSITION)
        if saved is not None:
            self.ledger = from_json(saved, Ledger)
        self.metrics.begin(self.ledger.step)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # The driver has told the person; it has no hand in the books.
            self.ledger.note("the controller died and went on from its position", "controller")
        await self._publish(self.ledger.step, self.config.engine.start_seconds)
        return self.ledger.step

    async def _publish(self, version: int, seconds: float) -> dict[str, Any]:
        result = await self.learners.publish(version, seconds)
        for text in result.get("notices", []):
            await self._said.notice(text)
        return result

    # Training -------------------------------------------------------------------------------------

    async def run(self, endpoint: str, started: float, seconds: dict[str, float]) -> dict[str, Any]:
        """Train to the last step and return the facts of the summary.

        endpoint: root of the gateway. started: time (epoch) from which this sitting counts; seconds: what the driver spent before,
        by phase.
        """
        self._counted_until = started
        await self._watch.begin()
        for phase, spent in seconds.items():
            self.ledger.book(phase, spent)
        self._body = asyncio.ensure_future(self._run(endpoint))
        ended_well = False
        try:
            facts = await self._body
            ended_well = True
        finally:
            await self.metrics.close(ended_well)
        return facts

    async def _run(self, endpoint: str) -> dict[str, Any]:
        # Of an earlier sitting: nobody waits for them, and their endpoint is gone.
        unfinished = [status for status in RolloutStatus if not status.final]
        stale = await self.store.query_rollouts(status_in=unfinished)
        await self.store.cancel_rollouts([rollout.rollout_id for rollout in stale])
        llm = LLM(
            endpoint=endpoint,
            model=MODEL_NAME,
            api_key=self._api_key,
            roles=role_models(self.config.roles),
        )
        resources = await self.store.add_resources({"main_llm": llm})
        groups = GroupRollouts(
            self.config,
            self.store,
            self.rows,
            resources.resources_id,
            positions=RowPositions(self.ledger.next_row, self.ledger.open_rows),
            weight_version=lambda: self.ledger.step,
        )
        pool = RunnerPools(
            self.config,
            self.store,
            self.agent,
            base=self.base,
            namespace=self.namespace,
            notice=lambda text: self._said.tell_soon(Notice(text=text, restarted="runner")),
            remark=lambda text: self._said.tell_soon(Notice(text=text)),
            hooks=self.hooks,
            host=replace(self.host, store_url=endpoint if self.config.store.door else None),
        )
        supervision = asyncio.ensure_future(pool.supervise())
        training = asyncio.ensure_future(self._train(groups))
        try:
            await asyncio.wait({supervision, training}, return_when=asyncio.FIRST_COMPLETED)
            if not training.done():
                supervision.result()  # raises: the pool ends early only by an error
            return training.result()
        finally:
            training.cancel()
            await pool.stop()
            await asyncio.gather(supervision, training, return_exceptions=True)

    async def _train(self, groups: GroupRollouts) -> dict[str, Any]:
        if self.ledger.before is None:
            await self._phase("preflight", groups.preflight())
            self.ledger.before = await self._evaluate(groups, 0)
            await self._commit(groups)
        await self._take_up(groups)
        feeder = BatchFeeder(self.config, groups, self._said, first_batch=self.ledger.step)
        async with feeder:
            while self.ledger.step < self.config.train.steps:
                await self._step(feeder, groups)
        # A finished run that is resumed for more steps has an `after` of older weights.
        if self.ledger.after is None or self.ledger.after.step != self.ledger.step:
            self.ledger.after = await self._evaluate(groups, self.ledger.step)
            await self._commit(groups)
        exported = self.learners.at(
            self.ledger.step, lambda group: group.export(self.folder / "export")
        )
        await self._phase("export", exported)
        return await self._facts()

    async def _take_up(self, groups: GroupRollouts) -> None:
        """Train on the batch that an earlier sitting had journalled for the next step and did not finish."""
        step = self.ledger.step + 1
        body = await self.store.get_state(step_key(step))
        if body is None or step > self.config.train.steps:
            return
        started, before = time.monotonic(), dict(self.ledger.seconds)
        batch = from_json(body, TrainBatch)
        groups.positions = RowPositions(batch.next_row, batch.open_rows)
        await self._learn(batch, groups, started, before)

    async def _step(self, feeder: BatchFeeder, groups: GroupRollouts) -> None:
        """One training step: batch, journal, update, sync, position."""
        step = self.ledger.step + 1
        started, before = time.monotonic(), dict(self.ledger.seconds)
        batch = await self._phase("rollout", feeder.next_batch(step))
        await self.store.put_state(step_key(step), to_json(batch))
        await self._learn(batch, groups, started, before)
        await feeder.advance(step)

    async def _learn(
        self, batch: TrainBatch, groups: GroupRollouts, started: float, before: dict[str, float]
    ) -> None:
        """A journalled batch: update, sync, checkpoint, validation, position. started, before: clock and ledger of its begin."""
        step = batch.step
        update = self.learners.at(step - 1, lambda group: group.train(batch, self.store))
        metrics = await self._phase("update", update)
        limit = self.config.weights.timeout_seconds
        result = await self._phase("sync", self._publish(step, limit))
        self.ledger.take({**metrics, **batch.sampled}, step)
        if step % self.config.train.checkpoint_every == 0 or step == self.config.train.steps:
            saved = self.learners.at(step, lambda group: group.save(step))
            await self._phase("checkpoint", saved)
        every = self.config.validation.every
        validation = None
        if every and step % every == 0 and step < self.config.train.steps:
            validation = await self._evaluate(groups, step)
        await self._commit(groups)
        metrics["seconds_step"] = time.monotonic() - started
        await self._report(batch, metrics, result, before, validation)

    # Books ----------------------------------------------------------------------------------------

    async def _evaluate(self, groups: GroupRollouts, step: int) -> Evaluation:
        rows = self.held_out[: self.config.validation.rows]
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self._said.tell_soon(Progress(name="validation", done=done, total=len(rows)))

        result: Evaluation = await self._phase("validation", groups.evaluate(rows, step, progress))
        attempts = [(r.rollout_id, r.attempt_id) for r in result.results if r.attempt_id]
        self.ledger.retokenized_tokens += await self.learners.at(
            step, lambda group: group.count_retokenized(self.store, attempts)
        )
        if not result.scores:
            raise RunError(f"validation at step {step}: no rollout ended ok ({result.failures})")
        await self.metrics.validated(result)
        return result

    async def _commit(self, groups: GroupRollouts) -> None:
        """Write the run's position into the store: what is not in it never happened."""
        now = time.time()
        self.ledger.total_seconds += now - self._counted_until
        self._counted_until = now
        await self._watch.hear()
        self.ledger.next_row = groups.positions.next_row
        self.ledger.open_rows = groups.positions.open_rows
        self.ledger.dropped_groups += groups.dropped_groups
        groups.dropped_groups = 0
        await self.store.put_state(POSITION, to_json(self.ledger))

    async def _report(
        self,
        batch: TrainBatch,
        metrics: dict[str, Any],
        result: dict[str, Any],
        before: dict[str, float],
        validation: Evaluation | None,
    ) -> None:
        failures = await self._new_failures()
        row = self.metrics.step(batch, metrics, result, self.ledger, before, failures, validation)
        await self._said.tell(StepDone(step=batch.step, steps=self.config.train.steps, metrics=row))

    async def _new_failures(self) -> dict[str, int]:
        """Attempts that did not end ok since the last call, by end reason."""
        ends = (await self.store.statistics())["attempts_by_reason"]
        new = {k: n - self._failures.get(k, 0) for k, n in ends.items() if k != "ok"}
        self._failures = dict(ends)
        return {reason: count for reason, count in new.items() if count}

    async def _facts(self) -> dict[str, Any]:
        """What the summary is made of: the ledger, and the store's counts."""
        statistics = await self.store.statistics()
        return {
            "ledger": self.ledger,
            "counted_until": self._counted_until,
            "end_reasons": statistics["attempts_by_reason"],
        }

    async def measure_learner(self, rounds: int) -> float:
        """Tokens per second through the learner alone: the last batch, laid out once, trained `rounds` times; the best.

        For benchmarks, after the run: it changes the learner's weights.
        """
        body = await self.store.get_state(step_key(self.ledger.step))
        if body is None:
            raise RunError("measuring the learner: expected a trained step, got none")
        batch = from_json(body, TrainBatch)
        return await self.learners.group.measure(batch, self.store, rounds)

    # Ending ---------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End runners and learner; the store keeps the position. Called at the end and on interruption."""
        if self._body is not None and not self._body.done():
            self._body.cancel()
            await asyncio.wait({self._body}, timeout=10)
        await self.metrics.close(False)
        self.learners.group.kill()
