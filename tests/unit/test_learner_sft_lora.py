"""Fine-tuning of adapters: what is trained, what is exported, resumption as if nothing had happened, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_learner_sft_run import CONFIG, made_rows
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from agl_ray.cli.app import main
from agl_ray.config.logging import LoggingConfig
from agl_ray.config.lora import LoraConfig
from agl_ray.learner import sft_run
from agl_ray.learner.sft import SFTStep
from agl_ray.learner.sft_run import SFTJob, run
from agl_ray.types import InputError
from tests.integration.tiny_model import make

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(model: Path, tmp_path: Path) -> SFTJob:
    return SFTJob(
        model=model,
        output=tmp_path / "out",
        rows=made_rows(0, 16),
        held_out=None,
        config=replace(CONFIG, lr=3e-2),
        facts={},
        lora=LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]),
        checkpoint_every=2,
        writers=LoggingConfig(writers=[]),
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def test_the_adapter_over_the_base_is_the_merged_model(job: SFTJob) -> None:
    from peft import PeftModel

    summary = run(job)
    assert summary["loss_last"] < summary["loss_first"]
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (job.model, job.output / "export")
    )
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    adapter = load_file(job.output / "export" / "adapter" / "adapter_model.safetensors")
    assert summary["parameters_trained"] == sum(tensor.numel() for tensor in adapter.values())
    assert summary["adapter"] == str(job.output / "export" / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    over = PeftModel.from_pretrained(plain, summary["adapter"])
    whole = AutoModelForCausalLM.from_pretrained(summary["export"], dtype=torch.float32)
    torch.testing.assert_close(logits(over), logits(whole), atol=1e-5, rtol=0)
    with over.disable_adapter():
        assert (logits(over) - logits(whole)).abs().max() > 1e-3


def test_a_killed_one_goes_on_with_its_adapters_only(
    job: SFTJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job)
    broken = replace(job, output=tmp_path / "broken")
    after = sft_run._Sitting._after

    def killed(self: Any, done: SFTStep) -> None:
        after(self, done)
        if done.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sft_run._Sitting, "_after", killed)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    saved = FileSystemReader(broken.checkpoints / "step-000004").read_metadata()
    names = [name for name in saved.state_dict_metadata if name.startswith("model.")]
    assert names
    assert all("lora_" in name for name in names)
    with pytest.raises(InputError, match=r"--resume: lora was \{.*\} and is None now"):
        run(replace(broken, resume=True, lora=None))
    run(replace(broken, resume=True))
    one, other = (
        load_file(folder / "export" / "adapter" / "adapter_model.safetensors")
        for folder in (job.output, broken.output)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 5)
    return path


def sft(model: Path, chats: Path, tmp_path: Path, *more: str) -> int:
    words = ["sft", "--model", str(model), "--data", str(chats), "--output", str(tmp_path / "out")]
    return main([*words, *more])


def test_the_adapter_alone(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lora-rank", "2", "--lora-alpha", "6", "--lora-target", "q_proj", "--adapter-only"]
    assert sft(model, chats, tmp_path, *options) == 0
    adapter = tmp_path / "out" / "export" / "adapter"
    shown = capsys.readouterr().out
    assert f"parameters): {adapter}" in shown
    assert "model: " not in shown
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (2, 6, ["q_proj"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora-alpha", "8"], "--lora-alpha is of adapters, and without --lora-rank"),
        (["--lora-target", "q_proj"], "--lora-target is of adapters"),
        (["--adapter-only"], "--adapter-only is of adapters"),
        (["--lora-rank", "2", "--lora-target", "quux"], "got quux; this model"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], words: str, model: Path, chats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sft(model, chats, tmp_path, *options) == 2
    assert words in capsys.readouterr().err
