"""Instrumentors are found by their entry points: packages made here, as a package index would install them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from opentelemetry.context import Context  # noqa: F401  the API's own entry points are read before the path is changed

from agl_ray.config import RunConfig
from agl_ray.config.tracing import TracingConfig
from agl_ray.tracing.instrument import instrument
from agl_ray.types import ConfigError

MODULE = """
done = []

class Instrumentor:
    is_instrumented_by_opentelemetry = False

    def instrument(self):
        if {raises}:
            raise OSError("no such library")
        type(self).is_instrumented_by_opentelemetry = {works}
        done.append(1)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def install(
    site: Path, package: str, name: str, *, works: bool = True, raises: bool = False
) -> str:
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(MODULE.format(works=works, raises=raises))
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[opentelemetry_instrumentor]\n{name} = {module}:Instrumentor\n"
    )
    importlib.invalidate_caches()
    return module


def calls(module: str) -> int:
    return len(importlib.import_module(module).done)


def test_auto_takes_one_per_library_and_nothing_else(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    official = install(site, "opentelemetry-instrumentation-genai-zeta", "zeta")
    doubled = install(site, "openinference-instrumentation-zeta", "zeta")
    alone = install(site, "openinference-instrumentation-eta", "eta")
    other = install(site, "opentelemetry-instrumentation-theta", "theta")
    install(site, "openinference-instrumentation-iota", "iota", works=False)
    install(site, "openinference-instrumentation-kappa", "kappa", raises=True)
    assert sorted(instrument("auto")) == [
        "openinference-instrumentation-eta",
        "opentelemetry-instrumentation-genai-zeta",
    ]
    assert [calls(one) for one in (official, doubled, alone, other)] == [1, 0, 1, 0]
    assert "iota is left off" in caplog.text
    assert "kappa is left off: no such library" in caplog.text
    instrument("auto")  # a second runner in the process
    assert calls(official) == 1


def test_named_ones_are_taken_from_any_family_or_refused(site: Path) -> None:
    any_family = install(site, "opentelemetry-instrumentation-lambda", "lambda")
    install(site, "openinference-instrumentation-my", "my", works=False)
    genai = install(site, "opentelemetry-instrumentation-genai-nu", "nu")
    install(site, "opentelemetry-instrumentation-a-nu", "nu")
    assert instrument(["opentelemetry-instrumentation-lambda", "nu"]) == [
        "opentelemetry-instrumentation-lambda",
        "opentelemetry-instrumentation-genai-nu",
    ]
    assert (calls(any_family), calls(genai)) == (1, 1)
    with pytest.raises(ConfigError, match=r"'my' \(openinference-instrumentation-my\): it refused"):
        instrument(["my"])
    with pytest.raises(ConfigError, match=r"'nobody'.*installed: .*instrumentation-lambda"):
        instrument(["nobody"])


def test_off_is_off_and_the_section_says_which(site: Path) -> None:
    module = install(site, "opentelemetry-instrumentation-genai-xi", "xi")
    assert instrument("off") == []
    assert calls(module) == 0
    assert TracingConfig().instrument == "auto"
    assert TracingConfig(instrument=["xi"]).instrument == ["xi"]
    with pytest.raises(ValueError, match="instrument"):
        RunConfig.model_validate({"model": {"path": "x"}, "tracing": {"instrument": "sometimes"}})
