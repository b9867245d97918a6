"""Agents of other frameworks as programs, and the process of the gateway that they speak to. Used by tests/frameworks only."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agl_ray.types import LLM

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
EXAMPLES = REPO / "examples" / "agents"
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG")


@dataclass(frozen=True)
class Told:
    """What came of one run of an agent. answers: what it printed; state: the attempt's counters; calls: its call spans, in order."""

    answers: list[str]
    state: dict[str, Any]
    calls: list[dict[str, Any]]

    @property
    def branches(self) -> list[str | None]:
        return [call["attributes"].get("agl.branch_reason") for call in self.calls]

    @property
    def dialects(self) -> set[str]:
        return {call["dialect"] for call in self.calls}


class Gateway:
    """gateway_process.py, spoken to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url: str = self._answer()["url"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", "[")):  # vLLM logs to standard output
                return json.loads(line)
        raise RuntimeError(f"the gateway's process ended with {self._process.wait()}")

    def _ask(self, do: str, **fields: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, python: Path, program: str, *arguments: str, **metadata: Any) -> Told:
        """Run an agent of examples/agents in an attempt of its own (mode train). metadata: of its rollout."""
        attempt = self._ask("attempt", metadata=metadata)
        base = LLM(endpoint=self.url, model="tiny").get_base_url(**attempt)
        command = [str(python), str(EXAMPLES / program), "--model", "tiny", *arguments]
        done = subprocess.run(
            command,
            env=agent_environment(base),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        state = f"{base.removesuffix('/v1')}/state"
        with urllib.request.urlopen(state, timeout=60) as answer:
            counters = json.load(answer)
        calls = self._ask("calls", attempt=attempt)
        self._ask("end", attempt=attempt)
        # A framework may print something of its own at the very end.
        printed = [line for line in done.stdout.splitlines() if line.startswith('["')]
        return Told(json.loads(printed[-1]), counters, calls)


def agent_environment(base: str) -> dict[str, str]:
    """Nothing but the two addresses is ours; the rest keeps frameworks from asking the internet for anything."""
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        "OPENAI_BASE_URL": base,
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_BASE_URL": base,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CREWAI_DISABLE_TELEMETRY": "true",
        "CREWAI_TRACING_ENABLED": "false",
        "OTEL_SDK_DISABLED": "true",
    }


def environment_of(venv: str) -> Path:
    """The Python of one of the environments; the test fails where it was not made."""
    python = Path(os.environ.get("FRAMEWORKS_VENVS", REPO)) / venv / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is not there: run `make test-frameworks`, which sets it up")
    return python
