"""`agl-ray check CONFIG`: what the configuration names is looked at, and a problem is exit code 2."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from agl_ray.cli import main
from agl_ray.learner.verl_env import TESTED

CONFIG = """\
agent: agent.py:calculator
model: {path: model}
data: {train: rows.jsonl, val: rows.jsonl, fields: [question]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1"}\n')
    (tmp_path / "agent.py").write_text(
        "import agl_ray as agl\n\n@agl.rollout\ndef calculator(task, llm):\n    return 1.0\n"
    )
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What the machine lacks is another test's matter.
    monkeypatch.setattr("agl_ray.ops.check.machine_findings", lambda *_: iter(()))
    return tmp_path


def test_all_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "small.yaml"]) == 0
    text = capsys.readouterr().out
    assert "1 rows from rows.jsonl" in text
    assert "a local Ray" in text
    assert "All well." in text
    endpoint = "judge={model: m, base_url: 'http://h/v1'}"
    assert main(["check", "small.yaml", endpoint]) == 0
    assert "m at http://h/v1" in capsys.readouterr().out
    assert main(["check", "small.yaml", "roles={a: train, b: {kind: frozen, model: model}}"]) == 0
    assert "a: train, b: frozen" in capsys.readouterr().out
    # A run from Python: Trainer.fit has the rows and the agent.
    assert main(["check", "small.yaml", "data={train: null, val: null}", "agent=null"]) == 0
    assert capsys.readouterr().out.count("none named: ") == 3


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["agent=agent.py:calculater"], ["agent", "did you mean 'calculator'"]),
        (["data.train=row.jsonl"], ["data.train", "did you mean 'rows.jsonl'"]),
        (["data.fields=[answer]"], ["line 1 has no field 'answer'"]),
        (["model.path=none"], ["model", "there is no folder"]),
        (["cluster.address=127.0.0.1:1"], ["cluster", "no Ray answers at 127.0.0.1:1"]),
        (["model={make: 'agent.py:make'}"], ["model", "has no 'make'"]),
        (["judge={function: 'agent.py:calculator'}"], ["judge", "for its parameter 'llm'"]),
        (["algorithm.kl={coefficient: 0.1, reference: x}"], ["reference", "there is no folder x"]),
        (["roles={old: {kind: frozen, model: runs/x}}"], ["roles.old.model: there is no folder"]),
    ],
)
def test_what_must_be_mended(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], parts: list[str]
) -> None:
    assert main(["check", "small.yaml", *overrides]) == 2
    captured = capsys.readouterr()
    problems = [line for line in captured.out.splitlines() if line.startswith("problem")]
    for part in parts:
        assert any(part in line for line in problems), captured.out
    assert "to mend" in captured.out
    assert captured.err == ""


def test_a_model_folder_without_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    assert main(["check", "small.yaml"]) == 2
    assert "no tokenizer" in capsys.readouterr().out


def environment(folder: Path, verl: str) -> None:
    """One whose `python` says that it is like here, with this version of verl."""
    here = {"python": sys.version.split()[0], "ray": version("ray"), "agl_ray": True}
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\necho '{json.dumps({**here, 'verl': verl})}'\n")
    python.chmod(0o755)


def verl_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of verl's environment."""
    out = capsys.readouterr().out
    return next(line for line in out.splitlines() if "learner.verl_env" in line)


def test_the_environment_of_verl(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verl = ["learner.backend=verl", "learner.verl_env=env"]
    assert main(["check", "small.yaml", *verl]) == 2
    line = verl_line(capsys)
    assert line.startswith("problem")
    assert "found no env; " in line
    assert "Make it with `make venv-verl`" in line
    environment(folder / "env", verl="0.8.0")
    assert main(["check", "small.yaml", *verl]) == 2
    assert f"expected verl {TESTED}, got 0.8.0; make it with `make venv-verl`" in verl_line(capsys)
    environment(folder / "env", verl=TESTED)
    assert main(["check", "small.yaml", *verl]) == 0
    assert f"verl {TESTED} in {folder / 'env'}" in verl_line(capsys)
    assert main(["check", "small.yaml"]) == 0
    assert "learner.verl_env" not in capsys.readouterr().out
    # It has to be on the nodes of the learner, of which this machine may be none.
    monkeypatch.setattr("actors.ray_cluster.check_reachable", lambda address: None)
    verl = ["learner.backend=verl", "learner.verl_env=/on/the/nodes", "cluster.address=h:1"]
    assert main(["check", "small.yaml", *verl]) == 0
    assert "/on/the/nodes: looked at on the learner's own nodes" in verl_line(capsys)
