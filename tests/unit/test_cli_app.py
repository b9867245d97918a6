"""The command line: exit codes, one paragraph for a mistake, examples in every help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agl_ray.cli import main, train
from agl_ray.cli.app import _own_error
from agl_ray.types import InputError, RunError

REPO = Path(__file__).resolve().parents[2]

CONFIG = """\
name: small
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
    return tmp_path


@pytest.mark.parametrize("verb", [["train"], ["config"], ["check"], ["version"], ["bench", "e2e"]])
def test_every_help_shows_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"agl-ray {' '.join(verb)}" in text


def test_the_list_of_verbs_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["store"], ["bench"]):
        assert main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert "..." not in text.split("Commands:")[1]
    assert main(["--help"]) == 0
    assert "nothing is trained." in " ".join(capsys.readouterr().out.split())


def test_config_prints_what_it_was_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "small.yaml", "train.steps=3", "seed=4"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["train"]["steps"] == 3
    assert resolved["agent"] == "agent.py:calculator"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["config", "smal.yaml"], "did you mean 'small.yaml'"),
        (["config", "small.yaml", "train.stepps=3"], "unknown key train.stepps"),
        (["train", "small.yaml", "train.steps=none"], "train.steps: expected a whole number"),
        (["train"], "name a configuration file"),
        (["train", "--resume", "no-such-run"], "there is no run no-such-run"),
        (["trian"], "trian"),
        (["train", "small.yaml", "--no-such-option"], "--no-such-option"),
    ],
)
def test_a_mistake_is_a_paragraph_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_debug_adds_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--debug", "smal.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


class FakeTrainer:
    """Stands where the trainer stands; records what it was given and does what the test wants."""

    given: dict[str, Any] = {}
    error: BaseException | None = None

    def __init__(self, config: Any, *, config_folder: Path, display: Any) -> None:
        type(self).given = {"config": config, "folder": config_folder}

    def fit(self, resume: str | None = None) -> dict[str, Any]:
        self.given["resume"] = resume
        if self.error is not None:
            raise self.error
        return {}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    monkeypatch.setattr("agl_ray.trainer.Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "error", None)
    return FakeTrainer


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (InputError("the data is wrong"), 2, "agl-ray: the data is wrong\n"),
        (RunError("the engine is gone"), 1, "agl-ray: the engine is gone\n"),
        (KeyError("surprise"), 1, "Traceback"),
        (KeyboardInterrupt(), 1, "agl-ray: interrupted"),
    ],
)
def test_errors_of_a_run(
    folder: Path,
    trainer: type[FakeTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    part: str,
) -> None:
    monkeypatch.setattr(trainer, "error", error)
    assert main(["train", "small.yaml"]) == code
    assert part in capsys.readouterr().err


def test_an_error_from_another_process_is_ours() -> None:
    class RemoteError(Exception):
        cause = InputError("the model has no tokenizer")

    assert str(_own_error(RemoteError("a long remote traceback"))) == "the model has no tokenizer"
    assert _own_error(ValueError("x")) is None


def test_train_hands_over_configuration_and_folder(
    folder: Path, trainer: type[FakeTrainer]
) -> None:
    assert main(["train", "small.yaml", "seed=3"]) == 0
    assert trainer.given["config"].seed == 3
    assert trainer.given["folder"] == folder
    assert trainer.given["resume"] is None


def test_resume_takes_the_run_s_configuration_and_origin(
    folder: Path, trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agl_ray.config import load_config
    from agl_ray.ops.run_folder import make_run_folder

    run = make_run_folder(load_config("small.yaml", ["seed=5"]), folder)
    for words in (["--resume", "latest"], ["train.steps=99", "--resume", str(run)]):
        assert main(["train", *words]) == 0
        assert trainer.given["config"].seed == 5
        assert trainer.given["folder"] == folder
        assert trainer.given["resume"] == str(run)
    assert trainer.given["config"].train.steps == 99
    assert main(["train", "small.yaml", "--resume", "latest"]) == 0
    assert (trainer.given["config"].seed, trainer.given["resume"]) == (0, str(run))


def test_split_tells_a_file_from_an_override(folder: Path) -> None:
    (folder / "a=b.yaml").write_text(CONFIG)
    assert train.split(["a=b.yaml", "seed=1"], None) == (Path("a=b.yaml"), ["seed=1"], None)


def test_nothing_heavy_is_imported_for_help_or_the_library() -> None:
    heavy = "{'torch', 'vllm', 'ray', 'transformers', 'pyarrow', 'matplotlib'}"
    for script in (
        "import agl_ray",
        "import agl_ray.cli; agl_ray.cli.main(['--help'])",
        "import agl_ray.cli; agl_ray.cli.main(['config', 'configs/quickstart.yaml'])",
    ):
        # VmHWM, not ru_maxrss: that one still counts the process which started this one.
        code = (
            f"{script}\nimport sys\npeak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
            f"print(sorted({heavy} & set(sys.modules)), peak)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        loaded, kilobytes = done.stdout.splitlines()[-1].rsplit(" ", 1)
        assert loaded == "[]", script
        assert int(kilobytes) < 100 * 1024, script
