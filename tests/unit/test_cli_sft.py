"""`agl-ray sft`: from conversations and from a store to a model folder; what is wrong is one paragraph and exit code 2."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_learner_sft_store import record

from agl_ray.cli.app import main
from agl_ray.learner import recompute
from tests.integration.tiny_model import make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": "yes" * (1 + i % 3)},
            ]
        }
        for i in range(10)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(model: Path, data: Path | str, tmp_path: Path, *more: str) -> int:
    words = ["sft", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    return main([*words, "--batch-rows", "4", *more])


def test_conversations_to_a_model(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(model, chats, tmp_path, "--epochs", "2", "--val-share", "0.2", "--lr", "1e-3") == 0
    shown = capsys.readouterr().out
    assert "4 of 4 rows" in shown
    assert f"model: {tmp_path / 'out' / 'export'}" in shown
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["conversations"], summary["rows"], summary["rows_held_out"]) == (10, 8, 2)
    assert list(summary["held_out_loss"]) == ["0", "4"]
    assert summary["held_out_loss"]["4"] < summary["held_out_loss"]["0"]
    assert (tmp_path / "out" / "export" / "model.safetensors").is_file()
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_layers_are_recomputed_where_asked(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(recompute, "recompute_layers", asked.append)
    assert sft(model, chats, tmp_path) == 0
    assert not asked
    assert sft(model, chats, tmp_path / "less", "--gradient-checkpointing") == 0
    assert len(asked) == 1


def test_a_runs_best_rollouts_to_a_model(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(record(f"sqlite:///{tmp_path}/store.db"))
    options = ["--best", "1", "--min-reward", "0.5", "--val", str(chats)]
    assert sft(model, tmp_path / "store.db", tmp_path, *options) == 0
    assert "rollouts 8, below_min_reward 2, not_ok 1, validation 1, not_best 2" in " ".join(
        capsys.readouterr().out.split()
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["rows_held_out"]) == (2, 10)
    assert summary["tokens_trained"] == 2 * 2 * 2  # an update of 4 rows goes twice over the data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--best", "2"], "--best chooses among a run's rollouts"),
        (["--val-share", "0.01"], "of 10 conversations that is 0"),
        (["--val", "v.jsonl", "--val-share", "0.1"], "--val or --val-share, not both"),
        (["--val", "v.jsonl"], "there is no data file v.jsonl"),
        (["--schedule", "step"], "--schedule: expected linear, cosine, constant, got 'step'"),
        (["--writer", "nobody"], "--writer: expected tensorboard, wandb, mlflow"),
        (["--max-row-tokens", "30"], "chats.jsonl', line 2: 31 tokens, expected at most 30"),
        (["--max-row-tokens", "5", "--overlong", "drop"], "no row is left"),
        (["--resume"], "no fine-tuning to go on with"),
        (["--device", "cuda", "--ranks", "64"], "a GPU for each of 64 ranks"),
    ],
)
def test_bad_options_are_named(
    options: list[str], words: str, model: Path, chats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sft(model, chats, tmp_path, *options) == 2
    assert words in capsys.readouterr().err


def test_too_long_rows_are_counted(model: Path, chats: Path, tmp_path: Path) -> None:
    assert sft(model, chats, tmp_path, "--max-row-tokens", "30", "--overlong", "drop") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows_dropped_overlong"] == 10 - summary["rows"] > 0


def test_bad_data_is_named(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chats.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "and?"}]}\n')
    assert sft(model, chats, tmp_path) == 2
    assert "chats.jsonl', line 11: expected at least one message with role assistant" in (
        capsys.readouterr().err
    )
    assert sft(model, "no-such-run", tmp_path) == 2
    assert "there is no run no-such-run" in capsys.readouterr().err
    assert sft(tmp_path, chats, tmp_path) == 2
    assert "expected config.json, found none" in capsys.readouterr().err
    rollouts = [("q", "train", 1.0, [100_000])]
    asyncio.run(record(f"sqlite:///{tmp_path}/store.db", rollouts))
    assert sft(model, tmp_path / "store.db", tmp_path) == 2
    assert "token id 100000, and the model" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("do not touch")
    assert sft(model, chats.with_name("chats.txt"), tmp_path) == 2
    assert "expected .jsonl, .parquet, or a run" in capsys.readouterr().err
