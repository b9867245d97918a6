"""RunSession: everything that a driver holds open for one run, brought up step by step and taken down in reverse.

Used by `agl_ray.trainer.Trainer`. Whatever ends the run (the end, an error, Ctrl-C, SIGTERM), leaving the session ends runners,
learner, Serve and, when it is ours, the local Ray, within the ten seconds that a person is ready to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.schema import ApplicationStatus

from actors.controller import Controller
from actors.engine import engine_deployment
from actors.engine_vllm import check_vllm
from actors.gateway import (
    check_door,
    gateway_deployment,
    gateway_key,
    serve_environment,
    start_serve,
    wait_until_open,
)
from actors.interruption import Interruption
from actors.model_maker import ModelMaker
from actors.ray_cluster import cluster_address, joined
from actors.store import create_store, journal_settings
from actors.store_door import door_key, store_doors
from actors.weight_sync import create_weight_sync
from agl_ray.agents import Hook, Host
from agl_ray.config import RunConfig
from agl_ray.config.roles import endpoint_keys
from agl_ray.config.store_address import store_url
from agl_ray.gateway.conversation import conversation
from agl_ray.gateway.engine_api import GenerateRequest
from agl_ray.learner.verl_env import check_environment
from agl_ray.ops.curves import draw_curves
from agl_ray.ops.display import Display
from agl_ray.ops.events import Done, Notice, Progress
from agl_ray.ops.ledger import PROCESSES, Ledger, RowResult
from agl_ray.ops.summary import write_summary
from agl_ray.ops.writer_choice import writer_keys
from agl_ray.store import LightningStore
from agl_ray.types import AglError, RunError, WaitTimeout
from agl_ray.waits import get, wait

log = logging.getLogger(__name__)

APPLICATION = "agl_ray"
STOP = 3.0  # seconds the controller gets to end runners and learner
EXAMPLES = 3
REASON = 1500  # characters of Serve's own message that are shown
OPEN = 30.0  # seconds for the HTTP door to answer once Serve says that it runs
START = 120.0  # seconds for a plain actor to start
TELL = 30.0  # seconds between two sentences about a start that takes long


class RunSession:
    """Context manager of one run; see the module's text. `folder` is the run folder, its name the namespace of the actors."""

    def __init__(self, config: RunConfig, folder: Path, display: Display) -> None:
        self.config, self.folder, self.display = config, folder, display
        self.namespace = folder.name
        self._stack = contextlib.ExitStack()
        self._interruption = Interruption()
        self._store: LightningStore | None = None
        self._door_key: str | None = None
        self._role_keys: dict[str, str] = {}
        self._api_key: str | None = None  # of the gateway
        self._rows: list[ray.ObjectRef] = []
        self._sync: ActorHandle | None = None  # held: Ray ends an actor whose last handle is gone

    def __enter__(self) -> RunSession:
        self._interruption.arm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._interruption.leave()
        try:
            self._stack.close()
        finally:
            self._interruption.restore()

    @property
    def store(self) -> LightningStore:
        if self._store is None:
            raise RunError("the session has no store yet: call start_services first")
        return self._store

    def start_services(self) -> None:
        """Ray, the store, weight sync. InputError at once when the HTTP door's port is taken."""
        check_door(self.config)
        self._api_key = gateway_key(self.config)
        self._door_key = door_key(self.config) if self.config.store.door else None
        self._role_keys = endpoint_keys(self.config.roles)
        url = store_url(self.config.store.url, self.folder)
        if cluster_address(self.config) is None:
            check_vllm()  # elsewhere the engine's own node says so
            if self.config.learner.backend == "verl":
                check_environment(self.config.learner.verl_env)
        self._stack.enter_context(
            joined(self.config, self.namespace, serve_environment(self.config))
        )
        self._interruption.arm()  # Ray has set handlers of its own
        self._store = create_store(
            "store",
            self.namespace,
            url,
            lease_seconds=self.config.runners.lease_seconds,
            memory_mib=self.config.store.memory_mib,
            cache_mib=self.config.store.cache_mib,
            settings=journal_settings(self.config.store, self.namespace),
        )
        self._stack.callback(self._close_store, self._store)
        self._sync = create_weight_sync(self.config, self.namespace)

    @staticmethod
    def _close_store(store: LightningStore) -> None:
        """Close the journal's files; what is in them is safe in any case."""
        closing = wait(store.shutdown(), on="the store to close its journal", seconds=STOP)
        try:
            asyncio.run(closing)
        except (AglError, ray.exceptions.RayError) as error:
            log.warning("the store was not closed: %s", error)

    def make_model(self, recipe: str, base: Path, folder: Path) -> None:
        """Make the base model in a process of its own; `folder` appears only when it is whole."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        maker = ray.remote(ModelMaker).options(num_cpus=0.5, max_concurrency=2).remote()
        made = maker.make.remote(recipe, str(base), str(partial), self.config.seed)
        limit = self.config.model.make_seconds
        deadline = time.monotonic() + limit
        while not ray.wait([made], timeout=0.5)[0]:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{recipe} to make the base model", limit, "model.make_seconds")
            what, share, detail = get(
                maker.progress.remote(), on=f"{recipe} to tell its progress", seconds=START
            )
            self.display.show(
                Progress(name=what, done=round(100 * share), total=100, detail=detail)
            )
        get(made, on=f"{recipe} to make the base model", seconds=5)
        ray.kill(maker)
        partial.rename(folder)

    def start_controller(
        self,
        agent: Any,
        rows: list[Any],
        held_out: list[Any],
        base: Path,
        model_path: Path,
        hooks: tuple[Hook, ...] = (),
    ) -> ActorHandle:
        """The controller; the learner comes up inside its `boot`, which `start_serving` begins."""
        self._rows = [ray.put(rows), ray.put(held_out)]
        controller: ActorHandle = (
            ray.remote(Controller)
            .options(
                name="controller",
                namespace=self.namespace,
                num_cpus=0,
                max_restarts=3,
                max_concurrency=64,
            )
            .remote(
                self.config.model_dump(mode="json"),
                namespace=self.namespace,
                run_folder=str(self.folder),
                base=str(base),
                model_path=str(model_path),
                agent=agent,
                hooks=hooks,
                host=Host(
                    store_key=self._door_key, artifacts_folder=str(self.folder / "artifacts")
                ),
                api_key=self._api_key,
                writer_keys=writer_keys(self.config.logging),
            )
        )
        self._stack.callback(self._stop_controller, controller)
        get(controller.ping.remote(), on="the controller to start", seconds=START)
        return controller

    def _stop_controller(self, controller: ActorHandle) -> None:
        with contextlib.suppress(WaitTimeout, ray.exceptions.RayActorError):
            get(controller.stop.remote(), on="the controller to stop", seconds=STOP)
        ray.kill(controller)

    def boot(self, controller: ActorHandle) -> ray.ObjectRef:
        """Let the controller (new or restarted) bring up the learner and the first weights."""
        boot: ray.ObjectRef = controller.boot.remote(self._rows)
        return boot

    def start_serving(self, controller: ActorHandle, model_path: Path) -> str:
        """Gateway and engines on Serve, while the learner boots and stages the first weights; the gateway's root URL."""
        boot = self.boot(controller)
        host, port = start_serve(self.config)
        self._stack.callback(serve.shutdown)
        engine = engine_deployment(self.config, str(model_path), self.namespace)
        frozen = {
            name: engine_deployment(
                self.config,
                role.model or str(model_path),
                self.namespace,
                follow=False,
                name=f"Engine-{name}",
                replicas=role.replicas,
            )
            for name, role in self.config.roles.items()
            if role.kind == "frozen"
        }
        application = gateway_deployment(
            self.config,
            str(model_path),
            self.namespace,
            engine,
            frozen,
            self._role_keys,
            self._api_key,
        )
        address = f"http://{host}:{port}"
        targets = [serve.RunTarget(application, name=APPLICATION, route_prefix="/")]
        if self.config.store.door:
            targets += store_doors(self.namespace, self._door_key, address)
        serve.run_many(
            targets,
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._wait_for_serving(boot, [target.name for target in targets])
        wait_until_open(host, port, OPEN)
        return address

    def _wait_for_serving(self, boot: Any, names: list[str]) -> None:
        """Until these applications run and the first weights are in; the first error of either side ends the wait."""
        limit = self.config.engine.start_seconds
        started = time.monotonic()
        told = 0
        booted = running = False
        while not (booted and running):
            if not booted and ray.wait([boot], timeout=0.2)[0]:
                get(boot, on="the controller to boot", seconds=5)
                booted = True
            found = serve.status().applications
            states = {name: found[name].status if name in found else None for name in names}
            running = all(state == ApplicationStatus.RUNNING for state in states.values())
            late = next((n for n, s in states.items() if s != ApplicationStatus.RUNNING), names[0])
            if states[late] == ApplicationStatus.DEPLOY_FAILED:
                raise RunError(f"{_WHAT.get(late, late)} did not start: {_reason(found[late])}")
            waited = time.monotonic() - started
            learner = "the learner is up" if booted else "the learner is not up yet"
            if waited > limit:
                hint = f"{learner}; {_reason(found.get(late))} (engine.start_seconds allows longer)"
                raise WaitTimeout(f"{_WHAT.get(late, late)} to start", limit, hint)
            if waited // TELL > told and not (booted and running):
                told = int(waited // TELL)
                text = f"still starting after {waited:.0f} s of at most {limit:g}: {learner}"
                self.display.show(Notice(text=f"{text}; {_states(found.get(late))}"))
            if booted:
                time.sleep(0.2)

    def time_engine(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        """(response tokens, seconds) of `requests` answered by one engine alone, all at once."""
        handle = serve.get_deployment_handle("Engine", APPLICATION)
        timed: tuple[int, float] = handle.time_calls.remote(requests).result(timeout_s=300)
        return timed

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json and curves.png and show the end; the summary."""
        ledger: Ledger = facts["ledger"]
        summary = write_summary(
            self.folder,
            before=ledger.before.scores if ledger.before else None,
            after=ledger.after.scores if ledger.after else None,
            attempts=facts["end_reasons"],
            seconds=ledger.seconds,
            total_seconds=ledger.total_seconds + time.time() - facts["counted_until"],
            updates=ledger.step,
            weight_versions=ledger.weight_versions,
            max_logprob_diff=ledger.max_logprob_diff,
            retokenized_tokens=ledger.retokenized_tokens,
            seed=self.config.seed,
            events=ledger.notices,
            examples=asyncio.run(self._examples(ledger)),
            name=self.config.name,
            run_folder=str(self.folder),
            restarts={kind: ledger.restarts.get(kind, 0) for kind in PROCESSES},
            dropped_groups=ledger.dropped_groups,
            refilled_groups=ledger.refilled_groups,
        )
        draw_curves(self.folder, summary["validation"])
        self.display.show(Done(summary=summary))
        return summary

    async def _examples(self, ledger: Ledger) -> list[dict[str, Any]]:
        """The first held-out rows that failed before training (or simply the first), before and after."""
        if ledger.before is None or ledger.after is None:
            return []
        rows = [
            (then, now)
            for then, now in zip(ledger.before.results, ledger.after.results, strict=True)
            if then.reward is not None and now.reward is not None
        ]
        low = [row for row in rows if row[0].reward == 0] or rows
        examples = []
        for pair in low[:EXAMPLES]:
            sides = [await self._side(result) for result in pair]
            examples.append({"before": sides[0], "after": sides[1]})
        return examples

    async def _side(self, result: RowResult) -> dict[str, Any]:
        spans = await self.store.query_span_rows(result.rollout_id, result.attempt_id)
        return {"messages": conversation(spans), "reward": result.reward}


_WHAT = {APPLICATION: "engine and gateway"}


def _reason(status: Any) -> str:
    """What Serve says about an application that is not up: its own message, then each deployment's."""
    if status is None:
        return "Serve knows nothing of it yet"
    said = [f"{name}: {d.message.strip()}" for name, d in status.deployments.items() if d.message]
    parts = [status.message, *said] if status.message or said else [_states(status)]
    text = "\n".join(part.strip() for part in parts if part.strip())
    # The cause stands at the end of a remote traceback.
    return text if len(text) <= REASON else f"...{text[-REASON:]}"


def _states(status: Any) -> str:
    """How far the deployments of an application are: `Engine updating, Gateway healthy`."""
    if status is None or not status.deployments:
        return "Serve has not begun with the engine"
    return ", ".join(f"{name} {d.status.value.lower()}" for name, d in status.deployments.items())
