"""One rank of verl's learner as a plain process, run by the Python of verl's environment: `python verl_ranks.py RANK WORLD PORT FOLDER`.

FOLDER/cases.pkl is a list of Case; what they gave goes to FOLDER/RANK.pt: (metrics of the steps, whole weights) by the name of the case.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.learner import fsdp
from agl_ray.learner.prepare import Payload
from agl_ray.learner.verl_engine import VerlLearner
from agl_ray.types import RunError


@dataclass(frozen=True)
class Case:
    """payloads: by step, one per rank. load, save, export: folders, before and after the steps."""

    name: str
    model: Path
    algorithm: AlgorithmConfig
    learner: LearnerConfig
    payloads: list[list[Payload]]
    load: Path | None = None
    save: Path | None = None
    export: Path | None = None


def run(case: Case, rank: int) -> dict[str, Any]:
    learner = VerlLearner(case.algorithm, case.learner, case.model, rank=rank)
    if case.load is not None:
        try:
            learner.load(case.load)
        except ValueError as error:
            return {"error": str(error)}
    try:
        metrics = [learner.train(payloads[rank]) for payloads in case.payloads]
    except RunError as error:
        return {"error": str(error), "state": learner.full_state(), "version": learner.version}
    if case.save is not None:
        learner.save(case.save)
    if case.export is not None:
        learner.export(case.export)
    return {
        "metrics": metrics,
        "state": learner.full_state(),
        "version": learner.version,
        "parameters": learner.num_parameters,
    }


def main() -> None:
    rank, world_size, port = (int(word) for word in sys.argv[1:4])
    folder = Path(sys.argv[4])
    torch.set_num_threads(1)
    fsdp.join_group(rank, world_size, "127.0.0.1", port, "cpu", 60.0)
    cases: list[Case] = pickle.loads((folder / "cases.pkl").read_bytes())
    torch.save({case.name: run(case, rank) for case in cases}, folder / f"{rank}.pt")
    fsdp.leave_group()


if __name__ == "__main__":
    sys.modules["verl_ranks"] = sys.modules["__main__"]  # by which the cases were pickled
    main()
