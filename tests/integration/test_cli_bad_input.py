"""Bad input given to `agl-ray train`, through the real trainer: one paragraph that says what to do, exit code 2, no run folder left
half made by what could be known before."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agl_ray.cli import main

CONFIG = """\
name: bad
agent: agent.py:calculator
model: {path: model}
data: {train: rows.jsonl, val: rows.jsonl, fields: [question]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad.yaml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1"}\n{"question": "2+2"}\n')
    (tmp_path / "agent.py").write_text(
        "import agl_ray as agl\n\n@agl.rollout\ndef calculator(task, llm):\n    return 1.0\n\nnumber = 3\n"
    )
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.gruop_size=4"], ["unknown key rollout.gruop_size", "'group_size'"]),
        (["data.train=train.jsonl"], ["there is no data file train.jsonl", "looked in"]),
        (["data.fields=[question, answer]"], ["line 1 has no field 'answer'", "it has 'question'"]),
        (["agent=agent.py:calc"], ["agent.py has no 'calc'"]),
        (["agent=agent.py:number"], ["agent 'agent.py:number'"]),
        (["model.path=mdl"], ["mdl"]),
        (["cluster.address=127.0.0.1:1"], ["no Ray answers at 127.0.0.1:1"]),
    ],
)
def test_what_was_given_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], parts: list[str]
) -> None:
    assert main(["train", "bad.yaml", *overrides]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    for part in parts:
        assert part in said


def test_a_model_folder_without_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    assert main(["train", "bad.yaml"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_the_gateways_port_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known before Ray is started: the command is back at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["train", "bad.yaml", f"gateway.port={port}"]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1:{port}" in said
    assert "choose another port" in said
