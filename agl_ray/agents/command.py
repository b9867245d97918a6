"""An agent that is a program, in any language.

    agent: {command: [node, agent.js]}        # in a configuration
    agl.CommandAgent(["node", "agent.js"])    # in Python

It is started once per rollout, with these variables beside those of the runner:

    OPENAI_BASE_URL, OPENAI_API_KEY           the endpoint of this attempt, for OpenAI's clients (what `ctx.llm()` gives)
    ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY     the same, for Anthropic's
    AGL_MODEL                                 the model's name
    AGL_TASK_FILE, AGL_TASK                   the task as JSON: in a file, and as text where it has at most 100,000 bytes
    AGL_RESOURCES_FILE                        the resources as JSON, by name (prompt templates, further endpoints)
    AGL_RESULT_FILE                           where its result may go
    AGL_ARTIFACTS                             a folder for whatever is to be kept; it goes where nothing is put into it
    AGL_ROLLOUT_ID, AGL_ATTEMPT_ID, AGL_ATTEMPT_NUMBER, AGL_MODE, AGL_STEP, AGL_GROUP_INDEX, AGL_WEIGHT_VERSION,
    AGL_TIMEOUT_SECONDS                       those that are known
    AGL_OPENAI_BASE_URL, AGL_EVENT_URL, AGL_KEY    agent-lightning 1.0's three, where the store's door is open (`store.door`)

Its reward is the `reward` of a JSON object: the content of AGL_RESULT_FILE where it has written that, else the last line of its stdout. Where
there is no such object, the reward that it has posted to the store counts; without one it is an agent error. Exit code 75 (EX_TEMPFAIL) says
that its environment failed (`env_error`); any other than 0 is an agent error with the end of its stderr. What it prints is kept with the
attempt in a span, of each stream the last 64 KiB. At the deadline it is ended with its process group; `runners.isolation: process` also
ends what has left that group.

Called by `agl_ray.agents.execute` like any agent. Test alone: tests/unit/test_agents_command.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agl_ray.agents.agent import EnvironmentFailure, LitAgent, RolloutContext, as_agent
from agl_ray.agents.tail import PIECE, Tail
from agl_ray.config.agent import CommandConfig
from agl_ray.config.imports import load_object
from agl_ray.spans import KIND_SPAN
from agl_ray.tracing import current_recorder
from agl_ray.types import AttemptedRollout, InputError, NamedResources, Rollout

COMMAND_SPAN = "agl_ray.command"
LONGEST_TASK = 100_000  # bytes: Linux takes no variable of more than 128 KiB
ENVIRONMENT_FAILED = 75
HEED = 0.7  # seconds between SIGTERM and SIGKILL, within what a cancelled agent gets
STORE_KEY = "AGL_STORE_API_KEY"


class CommandFailed(RuntimeError):
    """The program ended with an exit code, or gave a result that is none."""


class CommandAgent(LitAgent[Any]):
    """See the module's text.

    command: the program and its arguments. cwd: its working directory; None = the runner's. env: further variables. env_map: variable ->
    `input.field.of.the.task`: text as it is, anything else as JSON. InputError where they make no sense.
    """

    stateless = True

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        env_map: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(command, str) or not command or not all(isinstance(w, str) for w in command):
            raise InputError(
                f"agent.command: expected a program and its arguments as a list of texts, got {command!r:.200}"
            )
        self.command = tuple(command)
        self.cwd = None if cwd is None else str(cwd)
        self.env, self.env_map = dict(env or {}), dict(env_map or {})
        for name, path in self.env_map.items():
            if path.split(".")[0] != "input":
                raise InputError(
                    f"agent.env_map.{name}: expected input or input.FIELD, got {path!r}"
                )

    def check(self) -> None:
        """InputError where there is no such program or folder here."""
        if self.cwd is not None and not Path(self.cwd).is_dir():
            raise InputError(f"agent.cwd: there is no folder {self.cwd}")
        program = self.command[0]
        place = Path(self.cwd or ".") / program
        if shutil.which(program) is None and not ("/" in program and os.access(place, os.X_OK)):
            raise InputError(f"agent.command: there is no program {program!r} that can be started")

    def bound(
        self, attempt: AttemptedRollout, resources: NamedResources, ctx: RolloutContext
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        return self._run, {"rollout": attempt.rollout, "resources": resources, "ctx": ctx}

    async def _run(self, rollout: Rollout, resources: NamedResources, ctx: RolloutContext) -> Any:
        with tempfile.TemporaryDirectory(prefix="agl_ray_") as folder:
            result = Path(folder) / "result.json"
            variables = self._variables(Path(folder), rollout, resources, ctx)
            try:
                code, out, err = await self._finish({**os.environ, **variables})
            finally:
                _discard_empty(Path(variables["AGL_ARTIFACTS"]))
            if code == ENVIRONMENT_FAILED:
                raise EnvironmentFailure(f"the command's environment failed: {err.last_lines()}")
            if code != 0:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise CommandFailed(f"the command ended with {how}: {err.last_lines()}")
            return _reward(result, out)

    async def _finish(self, environment: dict[str, str]) -> tuple[int, Tail, Tail]:
        """Exit code, stdout and stderr of the program, recorded as a span however it ends."""
        started = time.time_ns()
        process, exited = await self._start(environment)
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = Tail(), Tail()
        reading = {
            asyncio.ensure_future(out.read(process.stdout)),
            asyncio.ensure_future(err.read(process.stderr)),
        }
        try:
            await exited.wait()
        finally:
            await _end(process, reading)
            said = {
                "command": list(self.command),
                "exit_code": process.returncode,
                "stdout": {"bytes": out.num_bytes, "tail": out.text},
                "stderr": {"bytes": err.num_bytes, "tail": err.text},
            }
            current_recorder().add(
                name=COMMAND_SPAN,
                kind=KIND_SPAN,
                start_ns=started,
                end_ns=time.time_ns(),
                status="OK" if process.returncode == 0 else "ERROR",
                attributes=said,
            )
        return process.returncode or 0, out, err

    async def _start(
        self, environment: dict[str, str]
    ) -> tuple[asyncio.subprocess.Process, asyncio.Event]:
        """The program, and the event of its end (`Process.wait` waits for all who hold its pipes)."""
        loop = asyncio.get_running_loop()
        try:
            transport, protocol = await loop.subprocess_exec(
                lambda: _Watched(limit=PIECE, loop=loop),
                *self.command,
                cwd=self.cwd,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise CommandFailed(f"the command cannot be started: {error}") from error
        return asyncio.subprocess.Process(transport, protocol, loop), protocol.exited

    def _variables(
        self, folder: Path, rollout: Rollout, resources: NamedResources, ctx: RolloutContext
    ) -> dict[str, str]:
        task = msgspec.json.encode(rollout.input)
        (folder / "task.json").write_bytes(task)
        (folder / "resources.json").write_bytes(msgspec.json.encode(resources))
        found = {
            "AGL_TASK_FILE": str(folder / "task.json"),
            "AGL_RESOURCES_FILE": str(folder / "resources.json"),
            "AGL_RESULT_FILE": str(folder / "result.json"),
            "AGL_ARTIFACTS": str(ctx.artifacts),
        }
        if len(task) <= LONGEST_TASK:
            found["AGL_TASK"] = task.decode()
        known = {
            "AGL_ROLLOUT_ID": ctx.rollout_id,
            "AGL_ATTEMPT_ID": ctx.attempt_id,
            "AGL_ATTEMPT_NUMBER": ctx.attempt_number,
            "AGL_MODE": ctx.mode,
            "AGL_STEP": ctx.step,
            "AGL_GROUP_INDEX": ctx.group_index,
            "AGL_WEIGHT_VERSION": ctx.weight_version,
            "AGL_TIMEOUT_SECONDS": ctx.timeout_seconds,
        }
        found |= {name: str(value) for name, value in known.items() if value is not None}
        mapped = {**_asked_over_http(rollout), **self.env_map}
        found |= {name: _field(name, path, rollout.input) for name, path in mapped.items()}
        return found | _endpoint(ctx) | _three(ctx) | self.env


class _Watched(asyncio.subprocess.SubprocessStreamProtocol):
    """`exited` is set as soon as the process is over."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


def agent_of(key: str | CommandConfig, base: Path) -> LitAgent:
    """The agent that the configuration's key names, in the folder `base`, checked. InputError where it is not there."""
    if isinstance(key, str):
        return as_agent(load_object(key, base), what=f"agent {key!r}")
    cwd = base / (key.cwd or ".")
    agent = CommandAgent(key.command, cwd=cwd, env=key.env, env_map=key.env_map)
    agent.check()
    return agent


def _endpoint(ctx: RolloutContext) -> dict[str, str]:
    """What `ctx.llm()` gives, for the clients of two makers; nothing where the rollout has no LLM."""
    llm = ctx.llms.get("")
    if llm is None:
        return {}
    key = llm.api_key or "none"
    return {
        "OPENAI_BASE_URL": llm.endpoint,
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": llm.endpoint.removesuffix("/").removesuffix("/v1"),
        "ANTHROPIC_API_KEY": key,
        "AGL_MODEL": llm.model,
    }


def _three(ctx: RolloutContext) -> dict[str, str]:
    """agent-lightning 1.0's variables, where its interface is served."""
    if ctx.store_url is None:
        return {}
    from agl_ray.store.doors.facade import environment

    key = os.environ.get(STORE_KEY)
    return environment(ctx.store_url, ctx.rollout_id, ctx.attempt_id, mode=ctx.mode, key=key)


def _asked_over_http(rollout: Rollout) -> dict[str, str]:
    """The `env_map` of a rollout that a client of agent-lightning 1.0 has queued."""
    from agl_ray.store.doors.facade_records import kept_of

    return (kept_of(rollout).get("local") or {}).get("env_map") or {}


def _field(name: str, path: str, task: Any) -> str:
    value = task
    for part in path.split(".")[1:]:
        if not isinstance(value, Mapping) or part not in value:
            raise CommandFailed(f"agent.env_map.{name}: the task has no {path!r}")
        value = value[part]
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _discard_empty(artifacts: Path) -> None:
    """Most programs keep nothing, and a long run has many rollouts: their folders, and the rollouts', go where they are empty."""
    for folder in (artifacts, artifacts.parent):
        with contextlib.suppress(OSError):  # something is in it
            folder.rmdir()


def _reward(result: Path, out: Tail) -> Any:
    """The reward by the one rule of the module's text; None where the program gave none."""
    if result.exists():
        try:
            given = msgspec.json.decode(result.read_bytes())
        except msgspec.DecodeError as error:
            raise CommandFailed(f"AGL_RESULT_FILE holds no JSON: {error}") from error
        if not isinstance(given, dict) or "reward" not in given:
            raise CommandFailed(
                f"AGL_RESULT_FILE: expected an object with `reward`, got {given!r:.200}"
            )
        return given["reward"]
    lines = out.text.rstrip().rsplit("\n", 1)
    with contextlib.suppress(msgspec.DecodeError):
        given = msgspec.json.decode(lines[-1])
        if isinstance(given, dict):
            return given.get("reward")
    return None


async def _end(process: asyncio.subprocess.Process, reading: set[asyncio.Task[None]]) -> None:
    """End the program's process group, whatever is left of it, and take what it has written."""
    waiting = asyncio.ensure_future(process.wait())
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if not (await asyncio.wait({waiting, *reading}, timeout=HEED))[1]:
            break
    for task in (waiting, *reading):
        task.cancel()
