"""Trainer: brings a run up, follows it, and takes it down again. The one place in the library that starts actors.

    agl.Trainer(config).fit(agent, train_rows, val_rows)

What `fit` does, in order: checks everything that can be checked without a cluster; joins or starts Ray; starts the store and
weight sync; makes the base model where the configuration asks for it; starts the controller, which brings up the learner,
while Ray Serve brings up gateway and engines (they wait for the first weights); then follows the controller's events until the run
is done. Whatever happens, also Ctrl-C and SIGTERM, it ends what it started.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config import RunConfig
from agl_ray.config.algorithm import located_reference
from agl_ray.config.load import resolved_json
from agl_ray.config.model_folder import cached_model, check_model_folder
from agl_ray.config.roles import located_roles, role_models
from agl_ray.config.rows import load_rows
from agl_ray.config.store_address import VARIABLE as DATABASE_URL
from agl_ray.config.verl import located_environment
from agl_ray.ops.display import Display, make_display
from agl_ray.ops.events import Notice, Phase
from agl_ray.ops.log import setup_logging
from agl_ray.ops.run_folder import make_run_folder
from agl_ray.ops.writer_choice import check_writers
from agl_ray.types import InputError, RunError, WaitTimeout
from agl_ray.waits import get

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from actors.session import RunSession
    from agl_ray.agents import Hook, LitAgent
    from agl_ray.agents.dev import Tried
    from agl_ray.types import NamedResources

EVENT_POLL = 1.0  # seconds of one long poll for the controller's events
CONTROLLER_RESTARTS = 3
RESTART_SECONDS = 120.0


class Trainer:
    """Trains one agent as `config` says.

    config_folder: where the configuration file lies; its relative paths are looked up there too. display: what the person
    sees; None chooses by whether there is a terminal. hooks: the user's code around every rollout (`agl_ray.Hook`); they are pickled.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        config_folder: Path | None = None,
        display: Display | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        from agl_ray.agents import check_hooks

        self.config = config
        self.hooks = check_hooks(hooks)
        self.base = (config_folder or Path.cwd()).resolve()
        self.display = display or make_display()
        self._started = time.time()
        self._seconds: dict[str, float] = {}

    def fit(
        self,
        agent: LitAgent | Any = None,
        train: list[Any] | None = None,
        val: list[Any] | None = None,
        resume: str | Path | None = None,
    ) -> dict[str, Any]:
        """Train and return the summary (also written to the run folder).

        agent: an `@agl.rollout` function or LitAgent; None takes `config.agent`. train, val: rows; None takes
        `config.data`. resume: a run folder whose run goes on. InputError (exit code 2) when something given is wrong,
        RunError when the run failed.
        """
        self._started = time.time()
        agent = self._agent(agent)
        from agl_ray.judge.asking import check_function
        from agl_ray.trajectory.credit import Credit

        # The functions that they name exist: said before anything starts.
        make_algorithm(self.config.algorithm, self.base)
        Credit(self.config.credit, self.base)
        check_function(self.config.judge, self.base)
        check_writers(self.config.logging)
        rows = self.rows("data.train", self.config.data.train) if train is None else train
        held_out = self.rows("data.val", self.config.data.val) if val is None else val
        if self.config.model.path is not None:
            check_model_folder(Path(self.config.model.path))
        roles = located_roles(self.config.roles, self.base)
        algorithm = located_reference(self.config.algorithm, self.base)
        learner = located_environment(self.config.learner, self.base)
        found = {"roles": roles, "algorithm": algorithm, "learner": learner}
        self.config = self.config.model_copy(update=found)
        self.config = _located(self.config)
        folder = Path(resume).resolve() if resume else make_run_folder(self.config, self.base)
        (folder / "config.json").write_text(resolved_json(self.config))
        setup_logging(folder, process="driver")
        from actors.session import RunSession

        with self.display, RunSession(self.config, folder, self.display) as session:
            return self._run(session, agent, rows, held_out)

    def dev(
        self,
        agent: LitAgent | Any = None,
        data: list[Any] | None = None,
        *,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        rows: int = 3,
        resources: NamedResources | None = None,
        mode: str = "train",
        timeout_seconds: float | None = None,
    ) -> list[Tried]:
        """Try the agent on the first `rows` rows, one after the other, with no training and no cluster, and print the call tree of each.

        agent: as in `fit`. data: rows; None takes `config.data`'s for the mode. base_url, api_key: an OpenAI-compatible server; None takes
        OPENAI_BASE_URL and OPENAI_API_KEY. It also answers for the config's roles; those of kind endpoint have their own, which gets the calls
        as they are (no other dialect, limit or pace). resources: further ones, such as a prompt template. mode: train, val or test.
        timeout_seconds: of a row, None = no deadline. Everything runs in this thread, so breakpoints work. InputError when something given
        is wrong.
        """
        from agl_ray.agents import agent_of, as_agent
        from agl_ray.agents.dev import develop, servers_of
        from agl_ray.agents.dev_show import show_total, show_tried

        if agent is None and self.config.agent is not None:
            found = agent_of(self.config.agent, self.base)
        else:
            found = as_agent(agent)
        if data is None:
            key = "train" if mode == "train" else "val"
            data = self.rows(f"data.{key}", getattr(self.config.data, key))
        tried = develop(
            found,
            data[:rows],
            base_url=base_url,
            model=model,
            api_key=api_key,
            resources=resources,
            roles=role_models(self.config.roles),
            servers=servers_of(self.config.roles),
            hooks=self.hooks,
            mode=mode,
            timeout_seconds=timeout_seconds,
            shown=show_tried,
        )
        show_total(tried)
        return tried

    # Checking what was given ----------------------------------------------------------------------

    def _agent(self, agent: Any) -> Any:
        """The agent, or its import string once it is known to import (the runners import it again)."""
        from agl_ray.agents import agent_of, as_agent

        if agent is not None:
            return as_agent(agent)
        if self.config.agent is None:
            raise InputError(
                "no agent: give `agent: path/file.py:function` or `agent: {command: [...]}` in the configuration, or "
                "Trainer.fit(agent)"
            )
        found = agent_of(self.config.agent, self.base)
        return self.config.agent if isinstance(self.config.agent, str) else found

    def rows(self, key: str, source: str | None) -> list[Any]:
        """The rows that the configuration names under `key`; InputError where it names none."""
        if source is None:
            raise InputError(
                f"no rows: give `{key}` in the configuration (a .jsonl or .parquet file, or file.py:function), "
                "or pass the rows to Trainer.fit"
            )
        return load_rows(source, self.config.seed, self.config.data.fields, self.base)

    # Running --------------------------------------------------------------------------------------

    def _run(
        self, session: RunSession, agent: Any, rows: list[Any], held_out: list[Any]
    ) -> dict[str, Any]:
        with self._phase("setup", "starting Ray and the store"):
            session.start_services()
        model_path = self.model(session)
        with self._phase("setup", "starting learner, engine and gateway"):
            controller = session.start_controller(
                agent, rows, held_out, self.base, model_path, self.hooks
            )
            endpoint = session.start_serving(controller, model_path)
        facts = self.follow(session, controller, endpoint)
        return session.finish(facts)

    def model(self, session: RunSession) -> Path:
        """The base model's folder, made now when the configuration says how and the cache has it not."""
        if self.config.model.path is not None:
            return Path(self.config.model.path).resolve()
        recipe = str(self.config.model.make)
        folder = cached_model(recipe, self.base, self.config.seed, self.config.cache_dir).resolve()
        if not folder.is_dir():
            with self._phase("sft"):
                session.make_model(recipe, self.base, folder)
        check_model_folder(folder)
        return folder

    def follow(self, session: RunSession, controller: ActorHandle, endpoint: str) -> dict[str, Any]:
        """Show the controller's events until its run is done; when it dies, Ray restarts it and the run goes on."""
        import ray

        for _ in range(CONTROLLER_RESTARTS + 1):
            run = controller.run.remote(endpoint, self._started, self._seconds)
            try:
                return self._events(controller, run)
            except ray.exceptions.RayActorError:
                self._started, self._seconds = time.time(), {}  # booked before it died
                self.display.show(
                    Notice(text="the controller died; it restarts from the position in the store")
                )
                _await_restart(controller)
                get(
                    session.boot(controller),
                    on="the restarted controller to boot",
                    seconds=self.config.engine.start_seconds,
                )
        raise RunError(f"the controller died {CONTROLLER_RESTARTS + 1} times")

    def _events(self, controller: ActorHandle, run: Any) -> dict[str, Any]:
        import ray

        cursor = 0
        while True:
            events = get(
                controller.events.remote(cursor, EVENT_POLL),
                on="the controller's events",
                seconds=60,
            )
            for event in events:
                self.display.show(event)
            cursor += len(events)
            if not events and ray.wait([run], timeout=0)[0]:
                return dict(get(run, on="the controller's result", seconds=30))

    @contextlib.contextmanager
    def _phase(self, name: str, shown: str | None = None) -> Iterator[None]:
        """Show a phase as `shown`, book its seconds under `name`."""
        self.display.show(Phase(name=shown or name, state="start"))
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self.display.show(Phase(name=shown or name, state="end", seconds=seconds))


def _await_restart(controller: ActorHandle) -> None:
    """Until Ray has started the controller again; while it does, calls to it fail at once. WaitTimeout after RESTART_SECONDS."""
    import ray

    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            get(controller.ping.remote(), on="the controller to restart", seconds=left)
            return
        except ray.exceptions.ActorUnavailableError as error:
            if left == 0.0:
                raise WaitTimeout("the controller to restart", RESTART_SECONDS) from error
            time.sleep(0.2)


def _located(config: RunConfig) -> RunConfig:
    """The configuration with the store's URL that the environment names, so that the run folder tells where the store is."""
    variable = os.environ.get(DATABASE_URL)
    if config.store.url is not None or not variable:
        return config
    store = config.store.model_copy(update={"url": variable})
    return config.model_copy(update={"store": store})
