"""Our learner under the benchmark's rows, in a process of its own: the plan and the answer of bench/peers/trl_driver.py, and growth.

A step is all that `Learner.train` does (forward, loss, backward, clipping, AdamW, metrics) and the packing of the rows. Run by
`agl_ray.bench.learner`; alone: `python learner_side.py '{"model": ..., ...}'`, the answer is the last line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    from agl_ray.learner.step import Learner
    from agl_ray.trajectory.ragged import Array, Rows


class Plan(TypedDict):
    """model, rows, steps, lr, max_grad_norm: as in trl_driver.py. tokens: budget of a micro-batch. growth: further cases, (rows, tokens of
    each), measured after the memory has been read."""

    model: str
    rows: str
    tokens: int
    steps: int
    lr: float
    max_grad_norm: float
    growth: list[tuple[int, int]]


def peak_mib() -> float:
    """The most memory this process has had resident, MiB; Linux."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def rows_of(given: list[Any]) -> Rows:
    """[prompt ids, completion ids, advantage] per row, with the streams that the loss takes."""
    from agl_ray.trajectory.ragged import Rows

    rows = Rows.from_lists(
        [prompt + completion for prompt, completion, _ in given],
        [[0] * len(prompt) + [1] * len(completion) for prompt, completion, _ in given],
    )
    size = len(rows.ids)
    trained = rows.weights > 0
    advantages = np.array([advantage for *_, advantage in given], np.float32)
    columns: dict[str, Array] = {
        "advantages": np.where(trained, advantages[rows.row_of_token], 0).astype(np.float32),
        "scale": np.full(size, 1 / trained.sum(), np.float32),
        "engine_logprobs": np.zeros(size, np.float32),
        "versions": np.zeros(size, np.int64),
    }
    return Rows(rows.ids, rows.lengths, rows.weights, columns)


def step(learner: Learner, rows: Rows) -> tuple[float, float, float]:
    """CPU and wall seconds of one training step on these rows, and its gradient norm."""
    from agl_ray.learner.packing import pack
    from agl_ray.learner.prepare import Payload, Update

    began = time.process_time(), time.perf_counter()
    update = Update(pack(rows, learner.config.tokens_per_microbatch))
    metrics = learner.train(Payload(learner.version + 1, [update], {}, {}))
    return (
        time.process_time() - began[0],
        time.perf_counter() - began[1],
        metrics["grad_norm"],
    )


def equal_rows(number: int, length: int) -> Rows:
    """A quarter of each row is prompt."""
    rng = np.random.default_rng(0)
    cut = max(1, length // 4)
    ids = rng.integers(3, 200, (number, length)).tolist()
    return rows_of([[row[:cut], row[cut:], float(rng.normal())] for row in ids])


def measure(plan: Plan) -> dict[str, Any]:
    """As trl_driver.measure; growth: CPU seconds of a step, by case."""
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig
    from agl_ray.config.models import LearnerConfig
    from agl_ray.learner.step import Learner

    torch.set_num_threads(1)
    config = LearnerConfig(
        lr=plan["lr"],
        max_grad_norm=plan["max_grad_norm"],
        tokens_per_microbatch=plan["tokens"],
    )
    learner = Learner(AlgorithmConfig(correction="none"), config, plan["model"])
    rows = rows_of(json.loads(Path(plan["rows"]).read_text()))
    before = peak_mib()
    steps = [step(learner, rows) for _ in range(plan["steps"])]
    peak = peak_mib()
    growth = []
    for number, length in plan["growth"]:
        made = equal_rows(number, length)
        growth.append(min(step(learner, made)[0] for _ in range(2)))
    return {
        "cpu_s": [cpu for cpu, _, _ in steps[1:]],
        "wall_s": [wall for _, wall, _ in steps[1:]],
        "grad_norm": steps[0][2],
        "tokens": len(rows.ids),
        "before_mib": before,
        "peak_mib": peak,
        "growth": growth,
    }


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    plan: Plan = json.loads(sys.argv[1])
    print(json.dumps(measure(plan)), flush=True)


if __name__ == "__main__":
    main()
