"""A training step of our learner against TRL's GRPOTrainer: useful tokens per CPU second and peak memory, and how a step's time grows.

The same model and the same ragged rows on both sides (lengths log-uniform from 16 to 512, a quarter of each is prompt), each side in a
process of its own, one after the other, one thread each, float32, no gradient checkpointing, no reference model, completions that are
there already. We pack rows; TRL pads them to the longest of the whole batch, so it is given several sizes of micro-batch and counts with
the best. Both must find the same gradient: the norm of the first step's is compared.
Called by `agl_ray.cli.bench`; alone: `agl-ray bench learner --quick`.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from agl_ray.bench.peers import environment as peer
from agl_ray.bench.peers import trl_env as trl
from agl_ray.types import RunError

Numbers = dict[str, Any]
SIDE = Path(__file__).with_name("learner_side.py")
VOCABULARY = 264
TOKENS = 4096  # budget of our micro-batches: what 8 rows of 512 take
SAME_GRADIENT = 1e-3  # relative
TRAINING = {"lr": 1e-4, "max_grad_norm": 1.0}


class Size(NamedTuple):
    """rows of the comparison; steps of each side, of which the first warms up; micro-batches that TRL is given, in rows; growth: cases
    (rows, tokens of each), one row of the table with rows, one with length."""

    rows: int
    steps: int
    peer_steps: int
    micros: tuple[int, ...]
    by_rows: tuple[tuple[int, int], ...]
    by_length: tuple[tuple[int, int], ...]


FULL = Size(
    rows=64,
    steps=6,
    peer_steps=4,
    micros=(8, 16),
    by_rows=((16, 128), (32, 128), (64, 128), (128, 128), (256, 128)),
    by_length=((8, 128), (8, 256), (8, 512), (8, 1024), (8, 2048)),
)
QUICK = Size(
    rows=24,
    steps=3,
    peer_steps=2,
    micros=(8,),
    by_rows=((16, 64), (32, 64), (64, 64)),
    by_length=((4, 128), (4, 256), (4, 512)),
)
KEYS = {
    "tokens_ratio_trl": "useful tokens per CPU second, ours / TRL's (the faster of its micro-batches)",
    "memory_ratio_trl": "peak memory of the process, ours / TRL's (the smaller of its micro-batches)",
    "memory_step_ratio_trl": "the same, of what training adds to the loaded model",
    "tokens_per_cpu_s": "tokens of the rows (prompts and completions, no padding) per CPU second of a training step",
    "step_cpu_s": "CPU seconds of a training step, median",
    "step_wall_s": "wall seconds of it",
    "peak_mib": "peak memory of our process, the growth cases apart",
    "before_mib": "peak memory before the first step",
    "trl_microN_tokens_per_cpu_s": "TRL with micro-batches of N rows: the same tokens per CPU second",
    "trl_microN_step_cpu_s": "CPU seconds of its step",
    "trl_microN_step_wall_s": "wall seconds of it",
    "trl_microN_peak_mib": "peak memory of its process",
    "trl_microN_before_mib": "peak memory before its first step",
    "useful_share": "useful tokens among all that TRL computes, its padding included",
    "rows": "rows of the comparison",
    "row_tokens": "their tokens",
    "grad_norm": "gradient norm of our first step",
    "gradient_difference": "relative difference of the two sides' gradient norms in the first step",
    "growth_rows_N_ms": "CPU ms of our step on N rows of equal length (128 tokens, 64 with --quick)",
    "growth_rows_N_us_per_token": "per token",
    "growth_length_N_ms": "CPU ms of our step on rows (8, 4 with --quick) of N tokens",
    "growth_length_N_us_per_token": "per token",
    "seconds": "the whole benchmark, without the installation",
    "load_1min": "load average of the machine at its end",
    "cpus": "cores of the machine",
}
"""What the keys mean."""


def run_learner(
    quick: bool = False, cache: Path = Path(".cache"), *, alone: bool = False
) -> Numbers:
    """Measure; flat keys, see KEYS. TRL's environment is made under `cache` first, unless `alone`.

    InputError: that environment cannot be made. RunError: a side fails, or the two do not do the same work."""
    python = None if alone else trl.environment(cache)
    begin = time.perf_counter()
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        made = ragged(size.rows)
        (folder / "rows.json").write_text(json.dumps(made))
        given = {"model": str(folder / "model"), "rows": str(folder / "rows.json"), **TRAINING}
        numbers = _ours(given, size)
        if python is not None:
            numbers |= _theirs(python, given, size, numbers)
    numbers["rows"] = size.rows
    numbers["row_tokens"] = sum(len(prompt) + len(said) for prompt, said, _ in made)
    numbers["seconds"] = time.perf_counter() - begin
    numbers["load_1min"], numbers["cpus"] = os.getloadavg()[0], os.cpu_count()
    return numbers


def _ours(given: Numbers, size: Size) -> Numbers:
    cases = [*size.by_rows, *size.by_length]
    plan = {**given, "tokens": TOKENS, "steps": size.steps, "growth": cases}
    found = peer.ask(Path(sys.executable), SIDE, plan, "our training")
    numbers = _side("", found)
    numbers["grad_norm"] = found["grad_norm"]
    names = [("rows", rows) for rows, _ in size.by_rows]
    names += [("length", length) for _, length in size.by_length]
    for (kind, at), (rows, length), busy in zip(names, cases, found["growth"], strict=True):
        numbers[f"growth_{kind}_{at}_ms"] = 1e3 * busy
        numbers[f"growth_{kind}_{at}_us_per_token"] = 1e6 * busy / (rows * length)
    return numbers


def _theirs(python: Path, given: Numbers, size: Size, ours: Numbers) -> Numbers:
    numbers: Numbers = {}
    sides: list[Numbers] = []
    for micro in size.micros:
        found = trl.train(python, {**given, "micro": micro, "steps": size.peer_steps})
        difference = abs(found["grad_norm"] / ours["grad_norm"] - 1)
        if difference > SAME_GRADIENT:
            raise RunError(
                f"bench learner: expected the same gradient on both sides, got norms {ours['grad_norm']:.6g} (ours) and "
                f"{found['grad_norm']:.6g} (TRL, micro-batches of {micro}); this is no comparison"
            )
        numbers["gradient_difference"] = difference
        numbers["useful_share"] = found["tokens"] / found["padded_tokens"]
        sides.append(_side("", found))
        numbers |= _side(f"trl_micro{micro}_", found)
    fastest = max(side["tokens_per_cpu_s"] for side in sides)
    numbers["tokens_ratio_trl"] = ours["tokens_per_cpu_s"] / fastest
    numbers["memory_ratio_trl"] = ours["peak_mib"] / min(side["peak_mib"] for side in sides)
    grown = min(side["peak_mib"] - side["before_mib"] for side in sides)
    numbers["memory_step_ratio_trl"] = (ours["peak_mib"] - ours["before_mib"]) / grown
    return numbers


def _side(prefix: str, found: Numbers) -> Numbers:
    busy = statistics.median(found["cpu_s"])
    return {
        f"{prefix}tokens_per_cpu_s": found["tokens"] / busy,
        f"{prefix}step_cpu_s": busy,
        f"{prefix}step_wall_s": statistics.median(found["wall_s"]),
        f"{prefix}peak_mib": found["peak_mib"],
        f"{prefix}before_mib": found["before_mib"],
    }


def ragged(number: int) -> list[tuple[list[int], list[int], float]]:
    """(prompt ids, completion ids, advantage) of each row: lengths log-uniform from 16 to 512, evenly drawn, in random order."""
    rng = random.Random(0)
    low, high = math.log(16), math.log(512)
    lengths = [round(math.exp(low + (high - low) * (i + 0.5) / number)) for i in range(number)]
    lengths[-1] = 512
    rng.shuffle(lengths)
    rows = []
    for length in lengths:
        ids = [rng.randrange(3, VOCABULARY - 8) for _ in range(length)]
        cut = max(2, length // 4)
        rows.append((ids[:cut], ids[cut:], rng.uniform(-1, 1)))
    return rows


def make_model(folder: Path) -> None:
    """A random Qwen3 of 1.8 million parameters with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    fast.save_pretrained(folder)
