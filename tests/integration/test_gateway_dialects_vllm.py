"""Every dialect over a real vLLM engine: one conversation through three of them keeps its ids; JSON and tool calls can be forced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.engine_vllm import engine_environment
from agl_ray.config.models import EngineConfig

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **engine_environment(EngineConfig())}
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, str(HERE / "gateway_over_vllm.py"), str(tmp_path_factory.mktemp("model"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def test_a_conversation_through_three_dialects_keeps_its_ids(found: dict[str, Any]) -> None:
    first = found["calls"][:4]
    assert [call["dialect"] for call in first] == [
        "openai.chat",
        "anthropic.messages",
        "openai.responses",
        "openai.responses",
    ]
    assert [call["agl.retokenized_tokens"] for call in first] == [0, 0, 0, 0]
    assert [call["agl.branch_reason"] for call in first] == [None] * 4
    assert "event: response.created" in found["streamed"]


def test_a_raw_prompt_of_ids_goes_on(found: dict[str, Any]) -> None:
    start, further = found["calls"][4:6]
    assert start["agl.branch_reason"] == "new_conversation"
    assert (further["agl.branch_reason"], further["agl.retokenized_tokens"]) == (None, 0)


def test_an_answer_has_the_form_that_was_asked_for(found: dict[str, Any]) -> None:
    assert found["formed"]["finish_reason"] == "stop"
    made = json.loads(found["formed"]["message"]["content"])
    assert made["expression"] in ("1+1", "2+2")
    assert found["calls"][6]["agl.constrained"] == "json"


def test_a_forced_call_is_a_call(found: dict[str, Any]) -> None:
    assert found["forced"]["stop_reason"] == "tool_use", found["forced"]
    call = found["forced"]["content"][-1]
    assert call["name"] == "calculator"
    assert call["input"]["expression"] in ("1+1", "2+2")
    assert found["calls"][7]["agl.constrained"] == "tool"


def test_a_schema_that_vllm_cannot_use_is_the_callers_error(found: dict[str, Any]) -> None:
    status, text = found["refused"]
    assert status == 400, text
