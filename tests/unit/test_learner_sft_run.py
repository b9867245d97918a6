"""A fine-tuning from rows to a model folder: what it writes, resumption as if nothing had happened, what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agl_ray.config.logging import LoggingConfig
from agl_ray.config.lora import LoraConfig
from agl_ray.learner import recompute, sft_run
from agl_ray.learner.sft import SFTConfig, SFTStep, Tuner
from agl_ray.learner.sft_run import SFTJob, run
from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import InputError, RunError
from tests.integration.tiny_model import make

CONFIG = SFTConfig(
    steps=6, lr=3e-3, batch_rows=4, warmup_steps=1, schedule="cosine", packed=True,
    tokens_per_microbatch=40,
)  # fmt: skip


def made_rows(seed: int, number: int) -> Rows:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, rng.integers(4, 25)) for _ in range(number)]
    weights = [np.arange(len(row)) % 3 > 0 for row in ids]
    return Rows.from_lists(ids, weights)


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
        held_out=made_rows(1, 3),
        config=CONFIG,
        facts={"data": "made"},
        val_every=4,
        checkpoint_every=2,
        writers=LoggingConfig(writers=[]),
    )


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "export" / "model.safetensors")


def test_what_a_fine_tuning_leaves_behind(job: SFTJob) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = run(job)
    rows = read_metrics(job.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert summary["loss"] == [row["loss"] for row in rows]
    assert summary["loss_last"] < summary["loss_first"]
    assert list(summary["held_out_loss"]) == ["0", "4", "6"]
    assert [r["step"] for r in read_metrics(job.output, VALIDATION_FILE)] == [0, 4, 6]
    assert summary["tokens_trained"] == sum(row["tokens_trained"] for row in rows)
    assert (summary["epochs"], summary["data"]) == (1.5, "made")
    assert (job.output / "curves.png").stat().st_size > 1000
    assert not job.checkpoints.exists()
    AutoModelForCausalLM.from_pretrained(job.output / "export")
    AutoTokenizer.from_pretrained(job.output / "export")


def test_a_killed_fine_tuning_goes_on_as_if_nothing_had_happened(
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
    with pytest.raises(InputError, match=r"--resume: lr was 0\.003 and is 0\.1 now"):
        run(replace(broken, resume=True, config=replace(CONFIG, lr=0.1)))
    with pytest.raises(InputError, match="go on with the fine-tuning in it: --resume"):
        run(broken)
    assert [path.name for path in broken.checkpoints.iterdir()] == ["step-000004"]
    summary = run(replace(broken, resume=True))
    assert [row["step"] for row in read_metrics(broken.output)] == [1, 2, 3, 4, 5, 6]
    assert summary["loss"] == json.loads((job.output / "summary.json").read_text())["loss"]
    undisturbed, resumed = tensors(job.output), tensors(broken.output)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    with pytest.raises(InputError, match="is finished"):
        run(replace(broken, resume=True))
    with pytest.raises(InputError, match="no fine-tuning to go on with"):
        run(replace(broken, resume=True, output=tmp_path / "nothing"))


def test_other_data_of_the_same_size_are_refused_by_name(job: SFTJob) -> None:
    ids, weights = job.rows.ids.copy(), job.rows.weights.copy()
    ids[3] += 1
    weights[np.flatnonzero(weights)[0]] = 0.5
    turned = job.rows.take(np.arange(len(job.rows))[::-1])
    others = [replace(job.rows, ids=ids), replace(job.rows, weights=weights), turned]
    sft_run._claim(job)
    for rows in others:
        assert rows.lengths.sum() == job.rows.lengths.sum()
        with pytest.raises(
            InputError, match=r"--resume: rows_sha256 was '\w{64}' and is '\w{64}' now"
        ):
            sft_run._claim(replace(job, resume=True, rows=rows))
    sft_run._claim(replace(job, resume=True, rows=made_rows(0, 16)))
    assert pickle.loads(pickle.dumps(job)).settings == job.settings


def test_one_whose_settings_do_not_tell_the_data_is_refused(job: SFTJob) -> None:
    sft_run._claim(job)
    path = job.output / "sft.json"
    told = {name: value for name, value in job.settings.items() if name != "rows_sha256"}
    path.write_text(json.dumps(told))
    with pytest.raises(
        InputError, match=r"expected rows_sha256 in .*sft\.json, found none: another version"
    ):
        run(replace(job, resume=True))


def gradient(model_path: Path, rows: Rows, tokens: int) -> Any:
    from agl_ray.learner.model import load_model

    model = load_model(model_path)
    tuner = Tuner(model, replace(CONFIG, tokens_per_microbatch=tokens))
    for part in tuner._losses(rows):
        (part / float(rows.weights.sum())).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_gradient_of_packed_rows_is_that_of_each_row_alone(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = made_rows(3, 7)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss = 0.0
    for i in range(len(rows)):
        alone = rows.take(np.array([i]))
        ids = torch.from_numpy(alone.ids.astype(np.int64))
        logprobs = plain(ids[None]).logits[0].log_softmax(-1)
        where = np.flatnonzero(alone.weights)
        loss = loss - logprobs[where - 1, ids[where]].sum() / float(rows.weights.sum())
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    for tokens in (1, 40, 10_000):
        found = gradient(model, rows, tokens)
        assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_recomputed_layers_make_the_same_model(
    job: SFTJob, tmp_path: Path, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    recompute_layers = recompute.recompute_layers
    monkeypatch.setattr(
        recompute, "recompute_layers", lambda model: (seen.append(model), recompute_layers(model))
    )
    chosen = None if rank is None else LoraConfig(rank=rank)
    plain = replace(job, config=replace(CONFIG, steps=3), lora=chosen)
    run(plain)
    assert not seen
    run(replace(plain, output=tmp_path / "recomputed", gradient_checkpointing=True))
    assert len(seen) == 1
    pair = tensors(job.output), tensors(tmp_path / "recomputed")
    assert pair[0].keys() == pair[1].keys()
    for name, tensor in pair[0].items():
        torch.testing.assert_close(pair[1][name], tensor, atol=1e-7, rtol=0)
    losses = [
        [row["loss"] for row in read_metrics(folder)]
        for folder in (job.output, tmp_path / "recomputed")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] != losses[0][2]


def test_a_loss_that_is_no_number_ends_it(job: SFTJob) -> None:
    with pytest.raises(
        RunError, match=r"fine-tuning step \d+: expected a finite gradient norm, got (nan|inf);"
    ):
        run(replace(job, config=replace(CONFIG, lr=1e30, max_grad_norm=1e30)))


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)]
)
def test_schedules_fall_from_1_to_their_end(schedule: Any, middle: float) -> None:
    config = SFTConfig(steps=12, lr=1.0, warmup_steps=2, schedule=schedule)
    assert [config.lr_share(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert config.lr_share(7) == pytest.approx(middle)
    assert config.lr_share(12) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_what_happens_after_a_ranks_work_cannot_make_it_fail() -> None:
    program = (
        "import atexit, os\n"
        "from agl_ray.learner import sft_run\n"
        "atexit.register(os.abort)  # as a thread of Gloo's does now and then while the interpreter shuts down\n"
        "sft_run.run_rank = lambda *given: print('trained', given[0])\n"
        "sft_run.own_process(1, None, 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "trained 1\n"), ended.stderr
