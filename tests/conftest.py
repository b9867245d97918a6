"""Shared fixtures: every test session starts its own Ray with its own temp dir, and closes it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

REPO = Path(__file__).resolve().parent.parent

# One OMP thread per process (two threads on two busy cores are ten times slower), no hub, no usage reports.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# No test is timed: on a busy machine the clock of an example says nothing. (`--hypothesis-profile=ci` has no deadline either.)
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once: a run that is killed later has no summary."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)", flush=True)
        print(report.longreprtext[-4000:], flush=True)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that sets up logging, as every command does, must not take the lines of later ones from pytest."""
    loggers = [logging.getLogger(name) for name in ("agl_ray", "actors")]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A short-named temp folder of this session (Ray's socket paths must stay under 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="agl"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(scratch: Path) -> Iterator[None]:
    """A local Ray of this session: 4 logical CPUs, no dashboard; ended with the session."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 1024 * 1024,
        _temp_dir=str(scratch / "ray"),
        log_to_driver=False,
    )
    yield
    ray.shutdown()
