"""`agl-ray check`: is the machine fit, and is what the configuration names there? Nothing is started or changed."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_ray.types import InputError, WaitTimeout

if TYPE_CHECKING:
    from agl_ray.config import RunConfig
    from agl_ray.ops.check import Finding

Config = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run; checked too.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Changes to its keys.")
]


def check(config: Config = None, overrides: Overrides = None) -> None:
    """Check this machine, and everything that CONFIG names; say what is wrong and how to mend it.

    \b
    Examples:
      agl-ray check
      agl-ray check configs/quickstart.yaml

    Exit code 2 when something must be mended.
    """
    from agl_ray.config import load_config
    from agl_ray.ops.check import machine_findings
    from agl_ray.ops.run_folder import base_of

    loaded = load_config(config, overrides or []) if config else None
    base = base_of(Path(config)) if config else None
    findings = []
    for finding in machine_findings(loaded, base):
        findings.append(finding)
        show(finding)
    if loaded and base:
        for finding in config_findings(loaded, base):
            findings.append(finding)
            show(finding)
    problems = sum(finding.state == "problem" for finding in findings)
    if problems:
        print(f"\n{problems} to mend, see above.")
        raise typer.Exit(2)
    print("\nAll well." if loaded else "\nAll well. Give a CONFIG to check what it names too.")


def show(finding: Finding) -> None:
    """One finding in a line, and the remedy under it."""
    print(f"{finding.state:<8} {finding.name:<20} {finding.text}", flush=True)
    if finding.state != "ok" and finding.mend:
        for line in textwrap.wrap(finding.mend, 100, break_long_words=False):
            print(f"{'':<8} {'':<20} mend: {line}", flush=True)


def config_findings(config: RunConfig, base: Path) -> Iterator[Finding]:
    """What the configuration names: cluster, model, data, agent, algorithm, verl's environment, judge, roles. Each failure is that part's own
    paragraph."""
    yield attempt("cluster", lambda: _cluster(config))
    yield attempt("model", lambda: _model(config, base))
    for key, source in (("data.train", config.data.train), ("data.val", config.data.val)):
        yield attempt(key, lambda source=source: _rows(config, source, base))  # type: ignore[misc]
    yield attempt("agent", lambda: _agent(config, base))
    yield attempt("algorithm", lambda: _algorithm(config, base))
    if config.algorithm.kl.on:
        yield attempt("reference", lambda: _reference(config, base))
    if config.algorithm.teacher is not None:
        yield attempt("teacher", lambda: _teacher(config, base))
    if config.learner.backend == "verl":
        yield attempt("learner.verl_env", lambda: _verl_environment(config, base))
    if config.judge.on:
        yield attempt("judge", lambda: _judge(config, base))
    if config.roles:
        yield attempt("roles", lambda: _roles(config, base))
    yield attempt("logging", lambda: _logging(config))


def attempt(name: str, work: Callable[[], str]) -> Finding:
    """ok with what `work` returns, or the InputError it raises as a problem."""
    from agl_ray.ops.check import Finding

    try:
        return Finding(name, "ok", work())
    except InputError as error:
        return Finding(name, "problem", str(error))


def _cluster(config: RunConfig) -> str:
    from actors.ray_cluster import check_reachable, cluster_address

    address = cluster_address(config)
    if address is None:
        return "a local Ray"
    check_reachable(address)
    return f"{address} answers"


def _model(config: RunConfig, base: Path) -> str:
    from agl_ray.config.imports import load_object
    from agl_ray.config.model_folder import check_model_folder
    from agl_ray.config.paths import find

    if config.model.path is None:
        load_object(str(config.model.make), base)
        return f"made by {config.model.make}"
    path = find(config.model.path, base) or Path(config.model.path)
    check_model_folder(path)
    return str(path)


def _algorithm(config: RunConfig, base: Path) -> str:
    from agl_ray.algorithms.algorithm import make_algorithm

    made = make_algorithm(config.algorithm, base).config
    return f"advantage {made.advantage}, loss {made.loss}"


def _reference(config: RunConfig, base: Path) -> str:
    from agl_ray.config.kl import reference_folder

    return str(reference_folder(config.algorithm.kl, base) or "the base model")


def _teacher(config: RunConfig, base: Path) -> str:
    import asyncio

    from agl_ray.config.paths import find
    from agl_ray.learner.teacher import Teacher

    if config.algorithm.teacher is None or config.model.path is None:
        return "looked at when the base model is made"
    teacher = Teacher(config.algorithm.teacher, config.learner.max_row_tokens)
    try:
        return asyncio.run(teacher.check(find(config.model.path, base) or Path(config.model.path)))
    except WaitTimeout as error:
        raise InputError(str(error)) from error


def _verl_environment(config: RunConfig, base: Path) -> str:
    from actors.ray_cluster import cluster_address
    from agl_ray.config.verl import located_environment
    from agl_ray.learner.verl_env import TESTED, check_environment

    folder = located_environment(config.learner, base).verl_env
    if cluster_address(config) is not None:
        return f"{folder}: looked at on the learner's own nodes when a run starts"
    check_environment(folder)
    return f"verl {TESTED} in {folder}"


def _roles(config: RunConfig, base: Path) -> str:
    from agl_ray.config.roles import endpoint_keys, located_roles

    located_roles(config.roles, base)
    endpoint_keys(config.roles)
    return ", ".join(f"{name}: {role.kind}" for name, role in config.roles.items())


def _logging(config: RunConfig) -> str:
    from agl_ray.ops.writer_choice import check_writers

    check_writers(config.logging)
    return ", ".join(config.logging.writers) or "no writers besides metrics.jsonl"


def _rows(config: RunConfig, source: str | None, base: Path) -> str:
    from agl_ray.config import load_rows

    if source is None:
        return "none named: they are given in Python, Trainer.fit(agent, train, val)"
    rows: list[Any] = load_rows(source, config.seed, config.data.fields, base)
    return f"{len(rows)} rows from {source}"


def _agent(config: RunConfig, base: Path) -> str:
    from agl_ray.agents import agent_of

    if config.agent is None:
        return "none named: it is given in Python, Trainer.fit(agent)"
    agent_of(config.agent, base)
    return config.agent if isinstance(config.agent, str) else shlex.join(config.agent.command)


def _judge(config: RunConfig, base: Path) -> str:
    from agl_ray.judge.asking import check_function

    check_function(config.judge, base)
    return config.judge.function or f"{config.judge.model} at {config.judge.base_url}"
