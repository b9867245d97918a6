"""The rows of `agl-ray sft`: conversations from files, or the best rollouts of a run's store; too long ones, and what is held out.

Called by `agl_ray.cli.sft`. Test alone: tests/unit/test_cli_sft.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agl_ray.trajectory.ragged import Rows
from agl_ray.types import InputError

FILES = (".jsonl", ".parquet")


class Data(NamedTuple):
    """rows to train on, rows to measure the loss on, and what there is to say of them."""

    rows: Rows
    held_out: Rows | None
    facts: dict[str, Any]


def load(given: Mapping[str, Any], model: Path) -> Data:
    """The rows that the options of `agl-ray sft` mean, for the model in this folder. InputError names option, file and line."""
    config = json.loads((model / "config.json").read_text())
    positions = config.get("max_position_embeddings")
    limit = min(n for n in (given["max_row_tokens"], positions, 10**9) if n)
    source = str(given["data"])
    facts: dict[str, Any] = {"data": source}
    if source.endswith(FILES):
        _only_of_a_run(given)
        made = _Conversations(given, model, limit)
        rows, held_out = made.split(source, given["val_share"], facts)
    else:
        if given["val_share"]:
            raise InputError(
                "--val-share holds out conversations of a file; of a run's rollouts, which share their rows, none can be held out so: "
                "give --val FILE"
            )
        made = _Conversations(given, model, limit)
        rows, held_out = _from_store(given, source, facts), None
        rows = made.fitting(rows, facts, lambda i: f"row {i + 1} of the rollouts of {source}")
    if given["val"]:
        held_out = made.read(str(given["val"]), {})
    _known_ids(rows, config.get("vocab_size"), source, model)
    facts |= {
        "rows": len(rows),
        "rows_held_out": 0 if held_out is None else len(held_out),
        "tokens_per_epoch": int(rows.lengths.sum()),
        "learned_tokens_per_epoch": int((rows.weights != 0).sum()),
    }
    return Data(rows, held_out, facts)


def _only_of_a_run(given: Mapping[str, Any]) -> None:
    for name in ("min_reward", "best"):
        if given[name] is not None:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} chooses among a run's rollouts, and --data is a file of conversations; leave it out"
            )


class _Conversations:
    """Conversations tokenized with the model's own tokenizer, rows of at most `limit` tokens."""

    def __init__(self, given: Mapping[str, Any], model: Path, limit: int) -> None:
        self._model, self._limit, self._overlong = model, limit, given["overlong"]
        self._seed = given["seed"]

    def read(self, spec: str, facts: dict[str, Any]) -> Rows:
        return self.split(spec, 0.0, facts)[0]

    def split(self, spec: str, share: float, facts: dict[str, Any]) -> tuple[Rows, Rows | None]:
        """Rows to train on, and of a share of the conversations, drawn by the seed, rows to hold out."""
        from agl_ray.learner.sft_rows import read_conversations

        conversations, name = read_conversations(spec, Path.cwd())
        facts["conversations"] = len(conversations)
        number = round(share * len(conversations))
        if share and not 0 < number < len(conversations):
            raise InputError(
                f"--val-share {share}: of {len(conversations)} conversations that is {number}; expected at least one on each side"
            )
        order = np.random.default_rng(self._seed).permutation(len(conversations)).tolist()
        parts = []
        for chosen in (sorted(order[number:]), sorted(order[:number])):
            picked = [conversations[i] for i in chosen]
            parts.append(self._rows(picked, [name(i) for i in chosen], facts) if picked else None)
        assert parts[0] is not None
        return parts[0], parts[1]

    def _rows(self, picked: list[Any], names: list[str], facts: dict[str, Any]) -> Rows:
        from transformers import AutoTokenizer

        from agl_ray.learner.sft_rows import end_ids, tokenize_rows

        tokenizer = AutoTokenizer.from_pretrained(str(self._model), local_files_only=True)
        most = self._limit if self._overlong == "error" else None
        ends = end_ids(tokenizer, self._model)
        rows = tokenize_rows(tokenizer, picked, most, name=names.__getitem__, ends=ends)
        facts["rows_split"] = facts.get("rows_split", 0) + len(rows) - len(picked)
        return self.fitting(rows, facts, lambda i: f"row {i + 1}")

    def fitting(self, rows: Rows, facts: dict[str, Any], name: Any) -> Rows:
        """The rows without those that are too long, or with their beginnings, counted; InputError where --overlong is error."""
        from agl_ray.config.trajectory import TrajectoryConfig
        from agl_ray.trajectory.overlong import fit

        if self._overlong == "error":
            long = np.flatnonzero(rows.lengths > self._limit)
            if len(long):
                raise InputError(
                    f"{name(int(long[0]))}: {rows.lengths[long[0]]} tokens, expected at most {self._limit} "
                    f"({len(long)} such rows); say --overlong drop or truncate"
                )
            return rows
        kept, _, counts = fit(rows, self._limit, TrajectoryConfig(overlong=self._overlong))
        if not len(kept):
            raise InputError(f"no row is left: each has more than {self._limit} tokens")
        for key in ("rows_dropped_overlong", "rows_truncated"):
            facts[key] = facts.get(key, 0) + int(counts[key])
        return kept


def _from_store(given: Mapping[str, Any], source: str, facts: dict[str, Any]) -> Rows:
    import asyncio

    from agl_ray.cli.store_target import opened, target_of
    from agl_ray.learner.sft_store import best_rollouts

    if Path(source).suffix in (".json", ".csv", ".txt"):
        raise InputError(
            f"--data {source}: expected .jsonl, .parquet, or a run; got another kind of file"
        )
    target = target_of(source)

    async def read() -> Any:
        async with opened(target) as archive:
            return await best_rollouts(archive, min_reward=given["min_reward"], best=given["best"])

    found = asyncio.run(read())
    facts["rollouts"] = found.counts
    return found.rows


def _known_ids(rows: Rows, vocabulary: int | None, source: str, model: Path) -> None:
    largest = int(rows.ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise InputError(
            f"--data {source}: it has token id {largest}, and the model in {model} has {vocabulary} ids only; give the model that the run "
            "was made with, or one with its tokenizer"
        )
