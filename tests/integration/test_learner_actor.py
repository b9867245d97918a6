"""Learner ranks as Ray actors, fed by a real store actor: layout, training, staging, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
import torch
from learner_data import model_folder, random_batch

from actors.learner import LearnerRank, PeerLost
from actors.store import create_store
from actors.weight_sync import create_weight_sync
from agl_ray import waits
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.kl import KLConfig
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.config.models import DataConfig, LearnerConfig, ModelConfig, RunConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.step import Learner
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.types import EndReason, InputError, RunError
from agl_ray.weights.sender import WeightSender
from tests.integration.weight_peers import PlainEngine

pytestmark = pytest.mark.slow

SECONDS = 120.0


def get(refs: Any) -> Any:
    return waits.get(refs, on="the learner actors of this test", seconds=SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def config(
    world_size: int,
    rows: Literal["merge-prefix", "per-call"] = "merge-prefix",
    lora: LearnerLoraConfig | None = None,
) -> RunConfig:
    return RunConfig(
        trajectory=TrajectoryConfig(rows=rows),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", val="unused"),
        algorithm=AlgorithmConfig(kl=KLConfig(coefficient=0.1, where="reward")),
        learner=LearnerConfig(
            world_size=world_size, tokens_per_microbatch=60, step_timeout_seconds=60, lora=lora
        ),
    )


class Ranks:
    """All ranks of a group, started; killed at the end."""

    def __init__(
        self,
        world_size: int,
        folder: Path,
        rows: Literal["merge-prefix", "per-call"] = "merge-prefix",
        lora: LearnerLoraConfig | None = None,
    ) -> None:
        settings = config(world_size, rows, lora).model_dump(mode="json")
        actor = ray.remote(LearnerRank).options(num_cpus=0.5, max_concurrency=4, max_restarts=0)
        self.ranks = [
            actor.remote(rank, world_size, settings, str(folder), 0) for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        self.ready = self("setup", *get(self.ranks[0].address.remote()))
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def __call__(self, method: str, *args: Any) -> list[Any]:
        return get([getattr(rank, method).remote(*args) for rank in self.ranks])

    def train(self, store: LightningStore, batch: TrainBatch) -> list[dict[str, float]]:
        refs = get(self.ranks[0].prepare.remote(store, batch))
        return get([rank.train.remote(ref) for rank, ref in zip(self.ranks, refs, strict=True)])


async def fill(
    store: LightningStore, seed: int, step: int, end: EndReason = EndReason.OK
) -> TrainBatch:
    """Rollouts with the spans of a made-up batch, ended; the last one with `end`."""
    spans, made = random_batch(seed, step=step)
    groups = []
    for group in made.groups:
        members = []
        for member in group.members:
            taken = await store.start_rollout({"row": 1})
            chosen = [row for row in spans.to_pylist() if row["rollout_id"] == member.rollout_id]
            for row in chosen:
                row |= {"rollout_id": taken.rollout_id, "attempt_id": taken.attempt_id}
                row["attributes"], row["resource"] = {}, {}
                row["weight_versions"] = [
                    (run["start"], run["version"]) for run in row["weight_versions"]
                ]
            await store.add_spans(taken.rollout_id, taken.attempt_id, span_batch(chosen))
            last = member is made.members[-1]
            reason = end if last else EndReason.OK
            reward = member.reward if reason is EndReason.OK else None
            await store.end_attempt(taken.rollout_id, taken.attempt_id, reason, reward=reward)
            members.append(
                Member(
                    rollout_id=taken.rollout_id, attempt_id=taken.attempt_id, reward=member.reward
                )
            )
        groups.append(GroupPlan(group_id=group.group_id, members=tuple(members)))
    return TrainBatch(step=step, groups=tuple(groups))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture(scope="module")
def store(ray_cluster: None) -> Iterator[LightningStore]:
    made = create_store("store", "learner-actor-test", "memory://")
    yield made
    run(made.shutdown())


def test_two_ranks_train_from_the_store_and_stage_their_weights(
    store: LightningStore, folder: Path, tmp_path: Path
) -> None:
    batches = [run(fill(store, 9, step)) for step in (1, 2)]
    alone, both = [], []
    with Ranks(1, folder, "per-call") as ranks:  # however rollouts are cut into rows
        alone = [ranks.train(store, batch)[0] for batch in batches]
    with Ranks(2, folder) as ranks:
        both = [ranks.train(store, batch)[0] for batch in batches]
        assert ranks("version") == [2, 2]
        first, second = ranks("stage_weights", 2)
        assert (first["version"], second) == (2, {})
        with pytest.raises(RunError, match="expected version 7, but learner rank"):
            get(ranks.ranks[0].stage_weights.remote(7))
        ranks("save", str(tmp_path / "step-2"))
        ranks("export", str(tmp_path / "export"))
    for one, two in zip(alone, both, strict=True):
        assert one["rows"] > two["rows"] > 4
        assert one["tokens_of_batch"] == two["tokens_of_batch"]
        for name in ("loss", "kl_reference", "kl_penalty"):
            assert one[name] == pytest.approx(two[name], abs=1e-5)
    assert both[1]["kl_reference"] > 0
    loaded = Learner(config(1).algorithm, config(1).learner, folder)
    loaded.load(tmp_path / "step-2")
    exported = Learner(config(1).algorithm, config(1).learner, tmp_path / "export")
    for (_, left), (_, right) in zip(loaded.full_state(), exported.full_state(), strict=True):
        assert torch.equal(left, right)


def test_adapters_reach_the_engines_merged(
    store: LightningStore, folder: Path, tmp_path: Path
) -> None:
    namespace = "learner-actor-lora"
    sync = create_weight_sync(config(2), namespace)
    engine = PlainEngine.remote(namespace, "replica-0")
    with Ranks(2, folder, lora=LearnerLoraConfig(rank=3)) as ranks:
        base = ranks("stage_weights", 0)[0]
        ranks.train(store, run(fill(store, 9, 1)))
        manifest = ranks("stage_weights", 1)[0]
        get(sync.set_learner.remote(ranks.ranks[0]))
        started = engine.start.remote(60)
        published = get(sync.publish.remote(manifest))
        assert get(started) == [(1, manifest["checksum"])]
        ranks("export", str(tmp_path / "export"))
    for actor in (engine, sync):
        ray.kill(actor)
    assert published["checksum"] == manifest["checksum"] != base["checksum"]
    plain = Learner(config(1).algorithm, config(1).learner, tmp_path / "export")
    assert (
        WeightSender(plain.full_state(), 1, 1 << 20).manifest()["checksum"] == manifest["checksum"]
    )


def test_a_failed_attempt_never_enters(store: LightningStore, folder: Path) -> None:
    batch = run(fill(store, 3, 1, end=EndReason.AGENT_ERROR))
    with Ranks(1, folder) as ranks, pytest.raises(RunError, match="a failure is never a reward"):
        ranks.train(store, batch)


def test_a_killed_rank_fails_the_other_by_name(store: LightningStore, folder: Path) -> None:
    with Ranks(2, folder) as ranks:
        ranks.train(store, run(fill(store, 4, 1)))
        refs = get(ranks.ranks[0].prepare.remote(store, run(fill(store, 5, 2))))
        os.kill(ranks.ready[1]["pid"], signal.SIGKILL)
        with pytest.raises(
            PeerLost, match="learner rank 0 lost another rank while training step 2"
        ):
            get(ranks.ranks[0].train.remote(refs[0]))
        with pytest.raises(ray.exceptions.RayActorError):
            get(ranks.ranks[1].train.remote(refs[1]))


def test_a_bad_model_folder_is_the_users_error(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"), Ranks(1, tmp_path / "nowhere"):
        pass
