"""`learner.cpu_offload` without a GPU: what FSDP2 is asked for where there is one, and the refusals where there is none.

That FSDP2's ways for offloaded weights give the same weights is in tests/integration/test_learner_ranks.py. Copies to a GPU are not tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder

from agl_ray.config.load import validate
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner import fsdp
from agl_ray.learner.model import load_model
from agl_ray.learner.step import Learner
from agl_ray.types import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("offload", [False, True])
def test_every_part_of_a_model_on_a_gpu_gets_the_policy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    from torch.distributed import device_mesh
    from torch.distributed import fsdp as torch_fsdp

    asked: list[tuple[Any, dict[str, Any]]] = []
    meshes: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fsdp.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *mesh: meshes.append(mesh))
    monkeypatch.setattr(torch_fsdp, "fully_shard", lambda part, **how: asked.append((part, how)))
    model = load_model(folder)
    fsdp.shard(model, torch.bfloat16, "cuda", offload)
    assert meshes == [("cuda", (3,))]
    assert [part for part, _ in asked] == [*model.model.layers, model]
    for _, how in asked:
        assert how["mp_policy"].param_dtype == torch.bfloat16
        policy = how["offload_policy"]
        assert isinstance(policy, torch_fsdp.CPUOffloadPolicy) == offload
        assert not offload or policy.pin_memory


def test_the_learner_loads_to_the_machines_memory_and_shards_one_rank_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fsdp, "shard", lambda *what: sharded.append(what))
    config = LearnerConfig(cpu_offload=True, num_gpus=1.0)
    algorithm = AlgorithmConfig.model_validate({"name": "ppo", "kl": {"coefficient": 0.1}})
    learner = Learner(algorithm, config, folder, device="cuda")
    assert learner.critic is not None
    models = [learner.model, learner.reference.model, learner.critic.model]
    assert sharded == [(model, torch.float32, "cuda", True) for model in models]
    assert {parameter.device.type for model in models for parameter in model.parameters()} == {
        "cpu"
    }


def test_where_an_offloaded_model_computes() -> None:
    class Mesh:
        device_type = "cuda"

    class Shard:
        device, device_mesh = torch.device("cpu"), Mesh()

    class Model:
        def parameters(self) -> Any:
            return iter([Shard()])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "current_device", lambda: 1)
        assert fsdp.device_of(Model()) == torch.device("cuda", 1)
    Mesh.device_type = "cpu"
    assert fsdp.device_of(Model()) == torch.device("cpu")


def test_the_group_also_carries_tensors_of_the_machines_memory() -> None:
    assert fsdp.backend_of("cuda") == "nccl"
    assert fsdp.backend_of("cuda:0", offload=True) == "cpu:gloo,cuda:nccl"
    assert fsdp.backend_of("cpu") == "gloo"


def test_without_a_gpu_it_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner.*cpu_offload .*num_gpus 0 .*leave it out"):
        validate({"model": {"path": "m"}, "learner": {"cpu_offload": True}})
    config = LearnerConfig(cpu_offload=True, num_gpus=1.0)
    with pytest.raises(ConfigError, match=r"expected a GPU to compute on, got cpu"):
        Learner(AlgorithmConfig(), config, folder, device="cpu")
