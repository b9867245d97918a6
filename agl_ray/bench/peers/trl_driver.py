"""TRL's GRPOTrainer under the benchmark's rows: training steps on completions that are there already, by CPU time and peak memory.

The library is used as it is, but for the one method that would generate and score: it gives the rows, padded by TRL's own `pad` as TRL
pads what it generates. So a step is forward, loss, backward, clipping and AdamW. Gradient checkpointing, which TRL turns on by itself and
which costs it a third more time, is off.

Run by `agl_ray.bench.peers.trl_env`, with the Python of that library's own environment (nothing of ours is importable there). Alone:
`ENV/bin/python trl_driver.py '{"model": ..., ...}'`; the plan is `Plan`, the answer, a JSON object, is the last line on stdout.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict


class Plan(TypedDict):
    """model: a folder with a tokenizer. rows: a JSON file of [prompt ids, completion ids, advantage] per row. micro: rows of a micro-batch, which
    divides their number. steps: training steps, the first of which warms up. lr, max_grad_norm: as ours."""

    model: str
    rows: str
    micro: int
    steps: int
    lr: float
    max_grad_norm: float


def peak_mib() -> float:
    """The most memory this process has had resident, MiB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def config(plan: Plan, folder: str, rows: int) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=plan["micro"],
        gradient_accumulation_steps=rows // plan["micro"],
        num_generations=rows,
        max_completion_length=16,
        max_steps=plan["steps"],
        learning_rate=plan["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=plan["max_grad_norm"],
        adam_beta2=0.95,
        weight_decay=0.0,
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )


def prepared(rows: list[Any]) -> dict[str, Any]:
    """What GRPOTrainer makes of prompts and completions that it has generated and scored."""
    import torch
    from trl.trainer.utils import pad

    prompts = [torch.tensor(row[0]) for row in rows]
    completions = [torch.tensor(row[1]) for row in rows]
    made: dict[str, Any] = {}
    for name, parts, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        made[f"{name}_ids"] = pad(parts, padding_value=0, padding_side=side)
        ones = [torch.ones_like(part) for part in parts]
        made[f"{name}_mask"] = pad(ones, padding_value=0, padding_side=side)
    made["advantages"] = torch.tensor([row[2] for row in rows])
    made["num_items_in_batch"] = made["completion_mask"].sum()
    return made


def measure(plan: Plan) -> dict[str, Any]:
    """CPU and wall seconds of each step but the first; gradient norm of the first; padded tokens; memory before and at most."""
    import torch

    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    rows = json.loads(Path(plan["rows"]).read_text())
    tokens = {"padded": 0, "useful": 0}

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            made = prepared(rows)
            masks = (made["prompt_mask"], made["completion_mask"])
            tokens["padded"] = sum(mask.numel() for mask in masks)
            tokens["useful"] = sum(int(mask.sum()) for mask in masks)
            return made

    marks: list[tuple[float, float]] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_args: Any, **_more: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=plan["model"],
            reward_funcs=lambda completions, **_more: [0.0] * len(completions),
            args=config(plan, folder, len(rows)),
            train_dataset=Dataset.from_dict({"prompt": ["w1"] * len(rows)}),
            processing_class=AutoTokenizer.from_pretrained(plan["model"]),
            callbacks=[Marks()],
        )
        before = peak_mib()
        trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "cpu_s": [after[0] - first[0] for first, after in itertools.pairwise(marks)],
        "wall_s": [after[1] - first[1] for first, after in itertools.pairwise(marks)],
        "grad_norm": norms[0],
        "tokens": tokens["useful"],
        "padded_tokens": tokens["padded"],
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    plan: Plan = json.loads(sys.argv[1])
    print(json.dumps(measure(plan)), flush=True)


if __name__ == "__main__":
    main()
