"""Agents that are programs: what they get, what counts as their reward, how they end."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import is_alive
from test_agents_isolation import attempts_of

import agl_ray as agl
from agl_ray.agents import run_agent, settled
from agl_ray.agents.command import COMMAND_SPAN
from agl_ray.agents.execute import Host
from agl_ray.agents.outcome import Outcome
from agl_ray.agents.tail import Tail
from agl_ray.config.load import validate
from agl_ray.tracing import SpanRecorder
from agl_ray.types import Attempt, AttemptedRollout, ConfigError, EndReason, InputError, Rollout


def run(
    script: str,
    task: Any = 1,
    *,
    host: Host | None = None,
    timeout: float = 60.0,
    metadata: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of a shell script as an agent, and the attributes of its span."""
    agent = agl.CommandAgent(["sh", "-c", script], **more)
    attempt = AttemptedRollout(
        rollout=Rollout(
            rollout_id="ro-1", input=task, start_time=0.0, mode="train", metadata=metadata or {}
        ),
        attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
    )
    resources: Any = {"main_llm": agl.LLM(endpoint="http://gate:1", model="policy")}
    recorder = SpanRecorder("ro-1", "at-1")
    work = run_agent(agent, attempt, resources, recorder, timeout, host=host or Host())
    outcome = settled(asyncio.run(work))
    spans = [row for row in recorder.take() if row["name"] == COMMAND_SPAN]
    return outcome, spans[0]["attributes"] if spans else {}


def test_a_program_gets_its_endpoint_its_task_and_its_place(tmp_path: Path) -> None:
    names = "OPENAI_BASE_URL ANTHROPIC_BASE_URL AGL_MODEL AGL_TASK AGL_ROLLOUT_ID AGL_STEP AGL_GROUP_INDEX AGL_MODE QUESTION N EXTRA"
    script = f'for n in {names}; do eval "echo \\"$n=\\$$n\\""; done; cat $AGL_TASK_FILE; pwd; echo; echo \'{{"reward": 1}}\''
    outcome, said = run(
        script,
        {"question": "6*7", "n": [1]},
        metadata={"step": 3, "group_index": 2},
        cwd=tmp_path,
        env={"EXTRA": "more"},
        env_map={"QUESTION": "input.question", "N": "input.n"},
        host=Host(artifacts_folder=str(tmp_path)),
    )
    assert outcome == Outcome(reason=EndReason.OK, reward=1.0)
    url = "http://gate:1/rollout/ro-1/attempt/at-1"
    task = '{"question":"6*7","n":[1]}'
    assert said["stdout"]["tail"].splitlines() == [
        f"OPENAI_BASE_URL={url}/v1",
        f"ANTHROPIC_BASE_URL={url}",
        "AGL_MODEL=policy",
        f"AGL_TASK={task}",
        "AGL_ROLLOUT_ID=ro-1",
        "AGL_STEP=3",
        "AGL_GROUP_INDEX=2",
        "AGL_MODE=train",
        "QUESTION=6*7",
        "N=[1]",
        "EXTRA=more",
        task + str(tmp_path),
        "",
        '{"reward": 1}',
    ]


def test_a_folder_for_artifacts_stays_where_something_is_in_it(tmp_path: Path) -> None:
    (folder := tmp_path / "artifacts").mkdir()
    host = Host(artifacts_folder=str(folder))
    said = "test -d $AGL_ARTIFACTS && echo '{\"reward\": 1}'"
    assert run(said, host=host)[0].reward == 1.0
    assert list(folder.iterdir()) == []
    assert run("exit 3", host=host)[0].reason is EndReason.AGENT_ERROR
    assert list(folder.iterdir()) == []
    assert run(f"echo kept > $AGL_ARTIFACTS/notes; {said}", host=host)[0].reward == 1.0
    assert (folder / "ro-1" / "at-1" / "notes").read_text() == "kept\n"


def test_a_large_task_is_in_its_file_only() -> None:
    script = 'test -z "$AGL_TASK" && wc -c < $AGL_TASK_FILE && echo \'{"reward": 1}\''
    outcome, said = run(script, "x" * 200_000)
    assert outcome.reward == 1.0
    assert said["stdout"]["tail"].split()[0] == "200002"


@pytest.mark.parametrize(
    ("script", "reason", "reward", "text"),
    [
        ("echo noise; echo '{\"reward\": 0.5}'", "ok", 0.5, ""),
        ("echo '{\"reward\": 0.5}' > $AGL_RESULT_FILE; echo '{\"reward\": 9}'", "ok", 0.5, ""),
        ("echo 42", "agent_error", None, "no reward"),
        ("true", "agent_error", None, "no reward"),
        ('echo \'{"reward": "high"}\'', "agent_error", None, "finite number"),
        ("echo '{\"reward\": NaN}'", "agent_error", None, "no reward"),
        ("echo 42 > $AGL_RESULT_FILE", "agent_error", None, "expected an object with `reward`"),
        ("echo '{' > $AGL_RESULT_FILE", "agent_error", None, "holds no JSON"),
        ("echo bad >&2; exit 3", "agent_error", None, "exit code 3: bad"),
        ("echo '{\"reward\": 1}'; exit 1", "agent_error", None, "exit code 1"),
        ("kill -9 $$", "agent_error", None, "SIGKILL"),
        ("echo no sandbox >&2; exit 75", "env_error", None, "no sandbox"),
    ],
)
def test_one_rule_for_the_reward(script: str, reason: str, reward: float | None, text: str) -> None:
    outcome, said = run(script)
    assert (outcome.reason, outcome.reward) == (reason, reward)
    assert text in (outcome.error or "")
    assert said["command"][0] == "sh"


def test_a_program_that_is_not_there_and_a_field_that_is_not() -> None:
    agent = agl.CommandAgent(["no-such-program"])
    with pytest.raises(InputError, match="no-such-program"):
        agent.check()
    outcome, _ = run("true", {"a": 1}, env_map={"B": "input.b"})
    assert outcome.reason is EndReason.AGENT_ERROR
    assert "'input.b'" in (outcome.error or "")
    for command in ("sh agent.sh", [], [1]):
        with pytest.raises(InputError, match=r"agent\.command"):
            agl.CommandAgent(command)  # type: ignore[arg-type]


def test_a_deadline_ends_the_group_and_keeps_what_was_printed(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    script = (
        f"sleep 3600 & echo $! > {file}; echo working; trap '' TERM; sleep 3600 & wait; sleep 3600"
    )
    for seconds in (0.5, 6.0, 60.0):  # a slow machine needs longer to come so far
        outcome, said = run(script, timeout=seconds)
        assert outcome.reason is EndReason.TIMEOUT
        if said["stdout"]["tail"]:
            break
    assert said["stdout"]["tail"] == "working\n"
    assert not is_alive(int(file.read_text()))


def test_what_a_program_leaves_in_its_group_does_not_hold_the_rollout(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    outcome, _ = run(f"sleep 3600 & echo $! > {file}; echo '{{\"reward\": 1}}'")
    assert outcome.reward == 1.0
    assert not is_alive(int(file.read_text()))


def test_much_output_is_bounded() -> None:
    script = "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo '{\"reward\": 1}'"
    outcome, said = run(script)
    assert outcome.reward == 1.0
    assert said["stdout"]["bytes"] > 20_000_000
    assert len(said["stdout"]["tail"]) <= 64 * 1024


def test_a_tail_of_small_pieces_is_the_end_of_all() -> None:
    tail = Tail(kept=10)
    for number in range(100):
        tail.add(f"{number:02d}".encode())
    assert (tail.text, tail.num_bytes) == ("9596979899", 200)
    tail.add(b"z" * 100)
    assert tail.text == "z" * 10


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_programs_run_under_every_isolation(isolation: str, tmp_path: Path) -> None:
    script = "import json, os; task = json.loads(os.environ['AGL_TASK']); print(json.dumps({'reward': task['x']}))"
    agent = agl.CommandAgent([sys.executable, "-I", "-S", "-c", script])
    tasks = [{"x": 0.25}, {"x": 0.5}]
    attempts, spans = asyncio.run(attempts_of(tasks, isolation, agent=agent, folder=tmp_path))
    assert [one.reward for one in attempts] == [0.25, 0.5]
    assert spans[0][0]["attributes"]["exit_code"] == 0


def test_the_configuration_may_name_a_program() -> None:
    given: dict[str, Any] = {"model": {"path": "m"}, "agent": {"command": ["node", "a.js"]}}
    config = validate(given)
    assert config.agent is not None
    assert not isinstance(config.agent, str)
    assert config.agent.command == ["node", "a.js"]
    assert json.loads(config.model_dump_json())["agent"]["command"] == ["node", "a.js"]
    assert validate({**given, "agent": "a.py:f"}).agent == "a.py:f"
    for agent, text in (
        ({"command": []}, "agent.command: expected at least 1 items"),
        ({"command": ["x"], "cwdd": "."}, "unknown key agent.cwdd; did you mean 'cwd'"),
        ({}, "the key agent.command is missing"),
        (5, "agent: expected a section (keys with values) or null, got 5"),
    ):
        with pytest.raises(ConfigError) as raised:
            validate({**given, "agent": agent})
        assert text in str(raised.value)
