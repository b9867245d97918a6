"""Locks: complete, pinned, within the ranges of pyproject.toml, and free of what belongs to one machine."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
LOCKS = REPO / "cluster" / "locks"
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (LOCKS / f"{name}.lock").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^=+;\s]+", line) for line in found)
    assert len(set(found)) == len(found)
    return dict(line.split("==") for line in found)


def requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_lock_fits_the_ranges_of_the_project(name: str) -> None:
    locked = pins(name)
    for requirement in requirements("learn", name, "quickstart", "dev"):
        wanted = canonicalize_name(requirement.name)
        if wanted != "agl-ray":
            assert requirement.specifier.contains(locked[wanted], prereleases=True), requirement


def test_the_lock_of_the_tests_adds_to_the_cpu_lock_and_fits_its_extra() -> None:
    locked = pins("test")
    assert not set(locked) & set(pins("cpu"))
    for requirement in requirements("test")[len(PROJECT["dependencies"]) :]:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_cpu_lock_takes_no_cuda() -> None:
    assert not [name for name in pins("cpu") if name.startswith(("nvidia", "triton", "flashinfer"))]


def test_everything_that_is_locked_needs_only_what_is_locked_or_left_out() -> None:
    locked = pins("cpu")
    left_out = {line.split()[0] for line in (LOCKS / "cpu.override").read_text().splitlines()}
    for name in locked:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, needed):
            wanted = canonicalize_name(requirement.name)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert wanted in locked or wanted in left_out, f"{name} needs {requirement}"


@pytest.mark.skipif(
    not (Path(sys.prefix) / ".ready-cpu").exists(), reason="not an environment made by make"
)
def test_the_environment_is_the_lock() -> None:
    for name, version in pins("cpu").items():
        assert importlib.metadata.version(name).split("+")[0] == version


def test_no_host_and_no_place_of_a_machine_in_what_sets_up() -> None:
    files = [REPO / "Makefile", REPO / ".ci" / "run", REPO / "pyproject.toml", *LOCKS.iterdir()]
    for path in files:
        if path.is_file():
            assert not re.search(r"https?://|file://|/opt/|/home/", path.read_text()), path


def test_the_configurations_are_short_and_load() -> None:
    from agl_ray.config import load_config

    for path in (REPO / "configs").glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 50
        load_config(path)
