"""verl's engine against our learner: same model, same rows, same algorithm, same loss, gradient and weights, on one rank and on two."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_data import model_folder, random_batch
from verl_ranks import Case

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.step import Learner
from agl_ray.learner.verl_env import python_of
from agl_ray.types import InputError
from tests.faults.whole_run import REPO

HERE = Path(__file__).resolve().parent
SECONDS = 300.0
SETTINGS = {"tokens_per_microbatch": 50, "max_row_tokens": 64, "warmup_steps": 3, "lr": 1e-3}
LEARNER = LearnerConfig.model_validate(SETTINGS)

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "ppo_clip": {"dual_clip": 3.0, "correction": "tis", "normalize": "batch"},
    "dr_grpo": {"name": "dr_grpo", "unit": "row"},
    "gspo": {"name": "gspo", "unit": "row", "correction": "seq-tis"},
    "cispo": {"name": "cispo", "correction": "none"},
    "sapo": {"name": "sapo", "unit": "row"},
    "proximal": {"proximal": "engine", "correction": "none"},
    "entropy": {"entropy_coefficient": 0.01, "aggregation": "seq-mean-token-sum", "unit": "row"},
}


def payloads(
    algorithm: AlgorithmConfig, config: LearnerConfig, *, verl: bool, steps: range = range(1, 3)
) -> list[list[Payload]]:
    """By step, one per rank. verl: with the rows of advantage 0, as VerlLearner asks for them."""
    made = make_algorithm(algorithm)
    if verl:
        made.skip_zero_advantage = False
    return [
        lay_out(*random_batch(9, step=step), made, config, world_size=config.world_size, seed=0)
        for step in steps
    ]


def run_verl(environment: str, cases: list[Case], world_size: int, out: Path) -> list[Any]:
    """What each rank gave."""
    out.mkdir(exist_ok=True)
    (out / "cases.pkl").write_bytes(pickle.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(REPO), str(REPO / "tests"), str(HERE)]
    ranks = [
        subprocess.Popen(
            [str(python_of(environment)), str(HERE / "verl_ranks.py"), str(rank), str(world_size), str(port), str(out)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdout=(out / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        codes = [rank.wait(SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs
    return [torch.load(out / f"{rank}.pt") for rank in range(world_size)]


def check_same(
    verls: dict[str, Any], ours: Learner, metrics: list[dict[str, float]], atol: float = 1e-6
) -> None:
    """To 1e-5, relative: floating point in another order. atol: of a weight."""
    for theirs, own in zip(verls["metrics"], metrics, strict=True):
        assert own["grad_norm"] > 0
        for name in (
            "loss",
            "grad_norm",
            "entropy",
            "engine_kl",
            "max_logprob_diff",
            "corrected_fraction",
        ):
            assert theirs[name] == pytest.approx(own[name], rel=1e-5, abs=2e-7), name
        for name in ("lr", "updates", "max_token_age", "tokens_trained", "tokens_current"):
            assert theirs[name] == own[name], name
    state = dict(ours.full_state())
    assert dict(verls["state"]).keys() == state.keys()
    for name, tensor in verls["state"]:
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=atol)


def everything(algorithm: AlgorithmConfig, folder: Path) -> tuple[Learner, list[dict[str, float]]]:
    """Our learner on the rows that verl gets, so that metrics over tokens are of the same tokens."""
    ours = Learner(algorithm, LEARNER, folder)
    ours.algorithm.skip_zero_advantage = False
    steps = payloads(algorithm, LEARNER, verl=True)
    return ours, [ours.train(shares[0]) for shares in steps]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "plain": model_folder(place / "plain"),
        "tied": model_folder(place / "tied", tied=True),
    }


class Ran:
    """Every case on `world_size` ranks of verl, and where they wrote."""

    def __init__(self, environment: str, models: dict[str, Path], world_size: int, out: Path):
        self.world_size, self.out, self.models = world_size, out, models
        self.config = LearnerConfig.model_validate({**SETTINGS, "world_size": world_size})
        self.algorithms = {
            name: AlgorithmConfig.model_validate(given) for name, given in CASES.items()
        }
        cases = [
            Case(name, models["plain"], algorithm, self.config, self.steps(algorithm))
            for name, algorithm in self.algorithms.items()
        ]
        self.ranks = run_verl(environment, [*cases, *self.with_files()], world_size, out)

    def steps(self, algorithm: AlgorithmConfig, first: int = 1, last: int = 2) -> Any:
        return payloads(algorithm, self.config, verl=True, steps=range(first, last + 1))

    def without_a_number(self, algorithm: AlgorithmConfig) -> Any:
        """A step in which one rank has advantages of nan."""
        steps = self.steps(algorithm, 1, 1)
        for micro in steps[0][-1].updates[0].micros:
            micro.columns["advantages"].fill(np.nan)
        return steps

    def with_files(self) -> list[Case]:
        grpo, plain, saved = AlgorithmConfig(), self.models["plain"], self.out / "step-1"
        ours = Learner(grpo, LEARNER, plain)
        ours.save(self.out / "ours")
        several = self.config.model_copy(update={"minibatches": 2, "lr": 0.02, "warmup_steps": 0})
        return [
            Case("first", plain, grpo, self.config, self.steps(grpo, 1, 1), save=saved),
            Case("rest", plain, grpo, self.config, self.steps(grpo, 2, 2), load=saved),
            Case("not verl's", plain, grpo, self.config, [], load=self.out / "ours"),
            Case(
                "tied",
                self.models["tied"],
                grpo,
                self.config,
                self.steps(grpo),
                export=self.out / "export",
            ),
            Case("several", plain, grpo, several, payloads(grpo, several, verl=True)),
            Case("no number", plain, grpo, self.config, self.without_a_number(grpo)),
        ]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def ran(
    request: pytest.FixtureRequest,
    environment: str,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    return Ran(environment, models, request.param, tmp_path_factory.mktemp("ran") / "ranks")


def without_seconds(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "seconds" not in name}


@pytest.mark.parametrize("name", sorted(CASES))
def test_two_steps_are_those_of_our_learner(ran: Ran, name: str) -> None:
    ours, metrics = everything(ran.algorithms[name], ran.models["plain"])
    got = ran.ranks[0][name]
    check_same(got, ours, metrics)
    assert (got["version"], got["parameters"]) == (2, ours.num_parameters)
    for rank in ran.ranks[1:]:
        assert rank[name]["state"] == []
        for own, first in zip(rank[name]["metrics"], got["metrics"], strict=True):
            assert without_seconds(own) == without_seconds(first)


def test_rows_without_advantage_are_there_for_the_denominators_only(ran: Ran) -> None:
    """Our learner leaves them out and knows the whole batch's counts; verl counts what it is given."""
    skipping = Learner(AlgorithmConfig(), LEARNER, ran.models["plain"])
    for shares in payloads(AlgorithmConfig(), LEARNER, verl=False):
        skipping.train(shares[0])
    verls = dict(ran.ranks[0]["grpo"]["state"])
    for name, tensor in skipping.full_state():
        torch.testing.assert_close(verls[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_one_that_never_stopped(ran: Ran) -> None:
    whole, rest = ran.ranks[0]["grpo"], ran.ranks[0]["rest"]
    assert (rest["version"], rest["metrics"][0]["lr"]) == (2, whole["metrics"][1]["lr"])
    assert without_seconds(rest["metrics"][0]) == without_seconds(whole["metrics"][1])
    for (name, left), (_, right) in zip(whole["state"], rest["state"], strict=True):
        assert torch.equal(left, right), name


def test_checkpoints_of_others_are_refused(ran: Ran) -> None:
    for rank in ran.ranks:
        assert "backend verl with learner.world_size" in rank["not verl's"]["error"]
        assert "got backend native" in rank["not verl's"]["error"]
    ours = Learner(AlgorithmConfig(), LEARNER, ran.models["plain"])
    with pytest.raises(InputError, match="got verl"):
        ours.load(ran.out / "step-1")


def test_an_export_of_a_tied_model_is_loaded_by_us(ran: Ran) -> None:
    ours, metrics = everything(AlgorithmConfig(), ran.models["tied"])
    got = ran.ranks[0]["tied"]
    # A weight whose gradient is nothing but rounding still moves in Adam's first steps, by its sign: a tenth of that is allowed here.
    check_same(got, ours, metrics, atol=1e-4)
    state = dict(Learner(AlgorithmConfig(), LEARNER, ran.out / "export").full_state())
    for name, tensor in got["state"]:
        assert torch.equal(state[name], tensor), name
    for name in ("config.json", "tokenizer.json"):
        copied = (ran.out / "export" / name).read_bytes()
        assert copied == (ran.models["tied"] / name).read_bytes()


def test_several_updates_of_a_batch_move_the_policy_and_clip(ran: Ran) -> None:
    for metrics in ran.ranks[0]["several"]["metrics"]:
        assert (metrics["updates"], metrics["lr"]) == (2, 0.02)
        assert metrics["kl_old"] > 0
        assert metrics["ratio_mean"] != 1
        assert metrics["pg_clipfrac"] > 0


def test_a_gradient_that_is_no_number_ends_the_step_and_moves_nothing(ran: Ran) -> None:
    """On every rank, also where the rows are sound; verl itself goes on."""
    base = dict(Learner(AlgorithmConfig(), LEARNER, ran.models["plain"]).full_state())
    for rank in ran.ranks:
        got = rank["no number"]
        assert "training step 1, policy: expected a finite gradient norm, got nan" in got["error"]
        assert got["version"] == 0
    for name, tensor in ran.ranks[0]["no number"]["state"]:
        assert torch.equal(tensor, base[name]), name
