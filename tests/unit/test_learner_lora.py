"""Low-rank adapters: what is frozen, what leaves the learner, what a checkpoint belongs to, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder, random_batch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from agl_ray.config.kl import KLConfig
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner import lora
from agl_ray.learner.model import load_model
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.types import InputError
from agl_ray.weights.sender import WeightSender

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def make(folder: Path, seed: int = 0, **settings: Any) -> Learner:
    chosen = LearnerLoraConfig(**{"rank": 4, **settings})
    return Learner(AlgorithmConfig(), LearnerConfig(lr=2e-2, lora=chosen), folder, seed=seed)


def train(learner: Learner, first: int = 1, last: int = 1) -> list[dict[str, float]]:
    rows = []
    for step in range(first, last + 1):
        spans, batch = random_batch(9, step=step)
        payload = lay_out(spans, batch, learner.algorithm, learner.config, world_size=1, seed=0)[0]
        rows.append(learner.train(payload))
    return rows


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def tensors(learner: Learner, adapters: bool) -> dict[str, torch.Tensor]:
    state = learner.model.state_dict()
    return {n: t.clone() for n, t in state.items() if lora.is_adapter(n) == adapters}


def test_before_the_first_step_it_is_the_base_model(folder: Path) -> None:
    learner, plain = make(folder), Learner(AlgorithmConfig(), LearnerConfig(), folder)
    assert torch.equal(logits(learner.model), logits(plain.model))
    for (name, left), (same, right) in zip(learner.full_state(), plain.full_state(), strict=True):
        assert name == same
        assert torch.equal(left, right)


def test_only_the_adapters_are_trained(folder: Path) -> None:
    learner = make(folder)
    frozen, adapters = tensors(learner, False), tensors(learner, True)
    identity = lora.identity(learner.model)
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    named = {name for name, p in learner.model.named_parameters() if id(p) in held}
    assert named == set(adapters)
    assert len(named) == 2 * 2 * 7  # A and B of seven linear layers in each of two
    (metrics,) = train(learner)
    assert metrics["grad_norm"] > 0
    assert all(torch.equal(t, frozen[n]) for n, t in tensors(learner, False).items())
    assert lora.identity(learner.model) == identity
    moved = [n for n, t in tensors(learner, True).items() if not torch.equal(t, adapters[n])]
    assert sorted(moved) == sorted(n for n in adapters if "lora_B" in n)  # A moves once B is not 0
    train(learner, 2, 2)
    after = tensors(learner, True)
    assert not [n for n in adapters if torch.equal(after[n], adapters[n])]


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_the_policy_without_adapters_is_the_reference(folder: Path, where: str) -> None:
    rows = {}
    for name in ("base", str(folder)):  # without a copy, and with one
        kl = {"coefficient": 0.3, "where": where, "reference": name}
        algorithm = AlgorithmConfig.model_validate({"kl": kl})
        config = LearnerConfig(lr=2e-2, lora=LearnerLoraConfig(rank=4), minibatches=2)
        learner = Learner(algorithm, config, folder)
        assert learner.reference is not None
        assert (learner.reference.model is learner.model) == (name == "base")
        rows[name] = train(learner, 1, 3)
    without, copied = rows.values()
    for left, right in zip(without, copied, strict=True):
        for key in ("loss", "grad_norm", "kl_reference"):
            assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-6)
    assert without[0]["kl_reference"] == 0.0 < 1e-3 < without[2]["kl_reference"]


@pytest.mark.parametrize("kind", [{"biases": True}, {"tied": True}, {"experts": True}])
def test_what_leaves_the_learner_is_merged_and_whole(tmp_path: Path, kind: dict[str, bool]) -> None:
    source = model_folder(tmp_path / "model", **kind)
    learner = make(source)
    train(learner, 1, 3)
    before = {**tensors(learner, True), **tensors(learner, False)}
    state = dict(learner.full_state())
    stored = load_file(source / "model.safetensors")
    assert sorted(state) == sorted(stored)
    changed = {name for name in stored if not torch.equal(state[name], stored[name])}
    parts = {"q_proj", "k_proj", "v_proj", "o_proj"}
    parts |= set() if "experts" in kind else {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in changed} == parts
    assert len(changed) == 2 * len(parts)
    now = {**tensors(learner, True), **tensors(learner, False)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in now.items())
    learner.export(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    adapted, base = logits(learner.model), logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(exported), adapted, atol=1e-5, rtol=0)
    assert (adapted - base).abs().max() > 1e-2  # the adapters do something
    with lora.adapters_off(learner.model):
        assert torch.equal(logits(learner.model), base)
    assert torch.equal(logits(learner.model), adapted)


def test_the_exported_adapter_is_one_for_peft(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    learner = make(folder, rank_stabilized=True)
    train(learner, 1, 2)
    learner.export(tmp_path / "export")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")
    torch.testing.assert_close(logits(adapted), logits(learner.model), atol=1e-5, rtol=0)
    assert adapted.peft_config["default"].base_model_name_or_path == str(folder)
    missing = adapted.load_adapter(tmp_path / "export" / "adapter", "again").missing_keys
    assert not [name for name in missing if "lora_" in name]


def test_what_the_engines_are_sent_has_another_checksum_after_each_step(folder: Path) -> None:
    learner, seen = make(folder), []
    for step in (0, 1, 2):
        if step:
            train(learner, step, step)
        manifest = WeightSender(learner.full_state(), step, 1 << 20).manifest()
        seen.append((manifest["checksum"], manifest["buckets"]))
    assert len({checksum for checksum, _ in seen}) == 3
    names = [[t["name"] for b in buckets for t in b["tensors"]] for _, buckets in seen]
    assert names[0] == names[1] == names[2] == [name for name, _ in learner.full_state()]


def test_rank_alpha_and_their_scale_act(folder: Path) -> None:
    layers = "model.layers.0.self_attn.q_proj"
    scales = {}
    for stabilized in (False, True):
        layer = make(folder, rank=4, alpha=8, rank_stabilized=stabilized).model.get_submodule(
            layers
        )
        assert layer.lora_A.default.weight.shape == (4, 32)
        scales[stabilized] = layer.scaling["default"]
    assert scales == {False: 2.0, True: 4.0}
    learner = make(folder, target_modules=["v_proj", "q_proj"])
    assert {name.split(".")[-4] for name in tensors(learner, True)} == {"q_proj", "v_proj"}


def test_the_first_adapters_are_of_the_seed(folder: Path) -> None:
    first, same, other = (tensors(make(folder, seed), True) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


@pytest.mark.parametrize(
    "names", [["q_proj", "quux"], ["lm_head"], ["embed_tokens"], ["self_attn"]]
)
def test_targets_that_are_no_linear_layer_are_refused(folder: Path, names: list[str]) -> None:
    with pytest.raises(InputError, match=rf"target_modules.*got {names[-1]};.*has down_proj"):
        make(folder, target_modules=names)


def test_experts_are_refused_as_targets(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model", experts=True)
    with pytest.raises(InputError, match="got experts; this model"):
        make(source, target_modules=["experts"])


def test_layers_that_share_a_weight_are_refused(folder: Path) -> None:
    model = load_model(folder)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    lora.add_adapters(model, LearnerLoraConfig(target_modules=["v_proj"]), 0)
    model = load_model(folder)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(
        InputError, match=r"layers\.0.*q_proj\.weight and .*layers\.1.* are one tensor"
    ):
        lora.add_adapters(model, LearnerLoraConfig(), 0)


# --- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_holds_adapters_only_and_is_resumed_exactly(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model", tied=True)
    whole = make(source)
    rows = train(whole, 1, 2)
    whole.save(tmp_path / "step-2")
    rows += train(whole, 3, 4)
    keys = FileSystemReader(tmp_path / "step-2").read_metadata().state_dict_metadata
    held = {key for key in keys if key.startswith("model.")}
    assert held == {f"model.{name}" for name in tensors(whole, True)}
    assert not [
        key
        for key in keys
        if key.startswith("optimizer.") and "lora_" not in key and "state" in key.split(".")[1]
    ]
    resumed = make(source, seed=7)  # other adapters at first
    resumed.load(tmp_path / "step-2")
    again = train(resumed, 3, 4)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[2:]]
    for (_, left), (_, right) in zip(whole.full_state(), resumed.full_state(), strict=True):
        assert torch.equal(left, right)


def test_a_critic_beside_adapters_is_trained_whole_and_saved_with_them(
    folder: Path, tmp_path: Path
) -> None:
    ppo = AlgorithmConfig.model_validate({"name": "ppo"})
    config = LearnerConfig(lr=2e-2, lora=LearnerLoraConfig(rank=4), warmup_steps=2)
    learner = Learner(ppo, config, folder)
    train(learner, 1, 2)
    learner.save(tmp_path / "step-2")
    resumed = Learner(ppo, config, folder, seed=7)
    resumed.load(tmp_path / "step-2")
    left, right = train(learner, 3, 3)[0], train(resumed, 3, 3)[0]
    for name in ("loss", "value_loss", "grad_norm", "critic_grad_norm"):
        assert left[name] == right[name] != 0
    assert learner.critic is not None
    assert all(p.requires_grad for p in learner.critic.model.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8}, "learner.lora.rank 8, got 4"),
        ({"alpha": 4}, "learner.lora.alpha 4, got 32"),
        ({"rank_stabilized": True}, "learner.lora.rank_stabilized True, got False"),
        (
            {"target_modules": ["q_proj"]},
            r"learner.lora.target_modules \['q_proj'\], got \['down_proj'",
        ),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    folder: Path, checkpoint: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        make(folder, **settings).load(checkpoint)


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "step-1"
    learner = make(folder)
    train(learner)
    learner.save(path)
    return path


def test_a_checkpoint_of_another_base_is_refused(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = make(model_folder(tmp_path / "other", seed=1))
    before = tensors(other, True)
    with pytest.raises(InputError, match="expected adapters of the base model with checksum"):
        other.load(checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(other, True).items())
    moved = tmp_path / "the same base elsewhere"
    shutil.copytree(folder, moved)
    make(moved).load(checkpoint)


def test_adapters_and_all_weights_do_not_load_each_other(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plain = Learner(AlgorithmConfig(), LearnerConfig(), folder)
    with pytest.raises(
        InputError, match=r"a checkpoint of all weights, .* got one of adapters only"
    ):
        plain.load(checkpoint)
    plain.save(tmp_path / "all")
    kl = KLConfig(coefficient=0.1, reference=str(checkpoint))
    with pytest.raises(InputError, match=r"one of all weights, it holds adapters only"):
        Learner(AlgorithmConfig(kl=kl), LearnerConfig(), folder)
    with pytest.raises(
        InputError, match=r"a checkpoint of adapters only, .* got one of all weights"
    ):
        make(folder).load(tmp_path / "all")
