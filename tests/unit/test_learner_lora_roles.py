"""One adapter per role: each learns from its own role's rows alone, is clipped, saved, resumed, exported and delivered by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder, roles_batch
from transformers import AutoModelForCausalLM

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config import load_config
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner import lora
from agl_ray.learner.packing import token_logprobs
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.types import ConfigError, InputError, RunError
from agl_ray.weights.sender import WeightSender

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ROLES = ["eval", "plan.ner"]  # a method of torch's modules, and a dot
BOTH = {"eval": 1, "plan.ner": 2}
CONFIG = LearnerConfig(
    lr=2e-2, tokens_per_microbatch=40, lora=LearnerLoraConfig(rank=4, per_role=True)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def make(folder: Path, seed: int = 0, config: LearnerConfig = CONFIG, **algorithm: Any) -> Learner:
    chosen = AlgorithmConfig.model_validate(algorithm)
    return Learner(chosen, config, folder, seed=seed, roles=ROLES)


def train(
    learner: Learner, seeds: Mapping[str, int] = BOTH, step: int = 1, **more: Any
) -> dict[str, float]:
    spans, batch = roles_batch(seeds, step=step, **more)
    (payload,) = lay_out(spans, batch, learner.algorithm, learner.config, world_size=1, seed=0)
    return learner.train(payload)


def hashes(learner: Learner) -> dict[str | None, dict[str, str]]:
    """Hash of every tensor, by the role whose adapter it is of; None: the base model's."""
    found: dict[str | None, dict[str, str]] = {}
    for name, tensor in learner.model.state_dict().items():
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        found.setdefault(lora.adapter_of(name), {})[name] = digest
    return found


def gradients(learner: Learner, seeds: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Of the second step, since A has none in the first one, where B is 0."""
    train(learner)
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        for name, parameter in learner.model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    learner.optimizer.step = keep  # type: ignore[method-assign, assignment]
    train(learner, seeds, step=2)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def test_a_roles_gradient_is_of_its_own_rows(folder: Path) -> None:
    free = CONFIG.model_copy(update={"max_grad_norm": 1e9})
    both, other = (gradients(make(folder, config=free), {**BOTH, "eval": seed}) for seed in (1, 5))
    assert both.keys() == other.keys()
    for name, gradient in both.items():
        assert torch.equal(gradient, other[name]) == (lora.adapter_of(name) == "plan.ner"), name
    alone = gradients(make(folder, config=free), {"plan.ner": 2})
    assert {lora.adapter_of(name) for name in alone} == {"plan.ner"}
    # The mean is over the tokens of both roles, which have as many.
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient / 2, both[name], atol=1e-6, rtol=1e-4)


def test_only_the_trained_roles_tensors_change(folder: Path) -> None:
    learner = make(folder)
    before = hashes(learner)
    assert before.keys() == {None, *ROLES}
    for step in (1, 2):
        metrics = train(learner, step=step, frozen=["eval"])
        assert metrics["calls_frozen"] == metrics["calls"] / 2
        assert metrics["grad_norm"] == pytest.approx(metrics["grad_norm.plan.ner"])
        assert "grad_norm.eval" not in metrics
    after = hashes(learner)
    assert after[None] == before[None]
    assert after["eval"] == before["eval"]
    assert all(after["plan.ner"][name] != old for name, old in before["plan.ner"].items())


def test_each_role_is_clipped_alone(folder: Path) -> None:
    config = CONFIG.model_copy(update={"max_grad_norm": 1e-4})
    learner = make(folder, config=config)
    norms: dict[str | None, torch.Tensor] = {}

    def keep() -> None:
        for role, trained in lora.parts(learner.model).items():
            norms[role] = torch.stack([p.grad.norm() for p in trained]).norm()

    learner.optimizer.step = keep  # type: ignore[method-assign, assignment]
    metrics = train(learner)
    assert {role: float(norm) for role, norm in norms.items()} == pytest.approx(
        dict.fromkeys(ROLES, 1e-4), rel=1e-2
    )
    of_roles = [metrics[f"grad_norm.{role}"] for role in ROLES]
    assert metrics["grad_norm"] == pytest.approx(sum(norm**2 for norm in of_roles) ** 0.5)
    tokens = [metrics[f"tokens_trained.{role}"] for role in ROLES]
    assert sum(tokens) == metrics["tokens_trained"] > 0
    largest = [metrics[f"max_logprob_diff.{role}"] for role in ROLES]
    assert max(largest) == metrics["max_logprob_diff"] > 0


@pytest.mark.parametrize("rows", ["merge-prefix", "tree", "per-call"])
def test_a_micro_batch_is_of_one_role_on_all_ranks(rows: str) -> None:
    from agl_ray.config.trajectory import TrajectoryConfig

    spans, batch = roles_batch(BOTH, group_size=2)
    payloads = lay_out(
        spans, batch, make_algorithm(AlgorithmConfig()), CONFIG, world_size=3, seed=0,
        trajectory=TrajectoryConfig.model_validate({"rows": rows}),
    )  # fmt: skip
    of_ranks = [[micro.role for micro in payload.updates[0].micros] for payload in payloads]
    assert of_ranks[0] == of_ranks[1] == of_ranks[2] == sorted(of_ranks[0])
    assert set(of_ranks[0]) == set(ROLES)
    weights = sum(m.weights.sum() for p in payloads for m in p.updates[0].micros)
    assert weights == payloads[0].stats["tokens_of_batch"]


def test_rows_of_no_role_are_refused() -> None:
    spans, batch = roles_batch(BOTH)
    spans = spans.set_column(
        spans.schema.get_field_index("role"), "role", [[None] * len(spans)]
    ).cast(spans.schema)
    made = make_algorithm(AlgorithmConfig())
    with pytest.raises(RunError, match="expected each row to be of one role, got one of None"):
        lay_out(spans, batch, made, CONFIG, world_size=1, seed=0)


def test_each_role_computes_with_its_own_adapter(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    learner, base = make(folder), logits(AutoModelForCausalLM.from_pretrained(folder))
    for step in (1, 2):
        train(learner, step=step)
    learner.export(tmp_path / "export")
    said = []
    for role in ROLES:
        lora.act_as(learner.model, role)
        said.append(logits(learner.model))
        exported = tmp_path / "export" / role
        merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        torch.testing.assert_close(logits(merged), said[-1], atol=1e-5, rtol=0)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, exported / "adapter")
        torch.testing.assert_close(logits(adapted), said[-1], atol=1e-5, rtol=0)
        assert (exported / "tokenizer.json").is_file()
        with lora.adapters_off(learner.model):
            assert torch.equal(logits(learner.model), base)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ROLES
    assert (said[0] - said[1]).abs().max() > 1e-2
    assert (said[0] - base).abs().max() > 1e-2


def test_old_logprobs_and_the_reference_are_each_roles_own(folder: Path) -> None:
    """Two updates, so that the log-probabilities at the start of the step come from a pass of their own, and the base as reference."""
    config = CONFIG.model_copy(update={"minibatches": 2, "gradient_checkpointing": True})
    learner = make(folder, config=config, kl={"coefficient": 0.1})
    first = train(learner, step=1)
    assert first["kl_reference"] == 0.0
    spans, batch = roles_batch(BOTH, step=2)
    (payload,) = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
    off = 0.0
    for micro in (micro for update in payload.updates for micro in update.micros):
        assert micro.role is not None
        lora.act_as(learner.model, micro.role)
        with torch.no_grad():
            difference = token_logprobs(learner.model, micro) - torch.tensor(
                micro.columns["engine_logprobs"]
            )
        off = max(off, float((difference * (torch.tensor(micro.weights) != 0)).abs().max()))
    second = learner.train(payload)
    assert second["max_logprob_diff"] == pytest.approx(off, rel=1e-4)
    assert second["kl_reference"] > 0


def test_engines_are_sent_the_adapters_under_their_roles(folder: Path) -> None:
    learner = make(folder)
    assert [name for name, _ in learner.full_state() if "lora_" not in name] == []
    assert {name.partition("/")[0] for name, _ in learner.full_state()} == set(ROLES)
    assert len(learner.full_state()) == 2 * 28
    checksums, digests = [], []
    for step in (0, 1, 2):
        if step:
            train(learner, {"eval": 1}, step=step)
        state = learner.full_state()
        checksums.append(WeightSender(state, step, 1 << 20).manifest()["checksum"])
        digests.append([t for name, t in state if name.startswith("plan.ner/")])
    assert len(set(checksums)) == 3
    assert all(torch.equal(a, b) for a, b in zip(digests[0], digests[2], strict=True))


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_goes_on_exactly_also_where_a_role_had_no_row_yet(
    folder: Path, tmp_path: Path
) -> None:
    whole = make(folder)
    for step in (1, 2):
        train(whole, {"eval": 1}, step=step)
    whole.save(tmp_path / "step-2")
    resumed = make(folder, seed=7)
    resumed.load(tmp_path / "step-2")
    assert hashes(resumed) == hashes(whole)
    for step in (3, 4):
        assert train(whole, step=step)["loss"] == train(resumed, step=step)["loss"]
    assert hashes(resumed) == hashes(whole)


def test_a_checkpoint_of_other_roles_is_refused(folder: Path, tmp_path: Path) -> None:
    make(folder).save(tmp_path / "step-0")
    fewer = Learner(AlgorithmConfig(), CONFIG, folder, roles=["eval"])
    with pytest.raises(InputError, match=r"per_role \['eval'\], got \['eval', 'plan.ner'\]"):
        fewer.load(tmp_path / "step-0")
    single = CONFIG.model_copy(update={"lora": LearnerLoraConfig(rank=4)})
    with pytest.raises(InputError, match=r"per_role None, got \['eval', 'plan.ner'\]"):
        Learner(AlgorithmConfig(), single, folder).load(tmp_path / "step-0")


def test_the_configuration_says_which_roles(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: '{folder}'}}\nlearner: {{lora: {{per_role: true}}}}\n")
    with pytest.raises(ConfigError, match=r"per_role trains an adapter for each role.*has none"):
        load_config(file, ["roles={critic: frozen}"])
    config = load_config(file, ["roles={b: train, critic: frozen, a: train}"])
    assert config.adapters == ["a", "b"]
    assert load_config(file, ["learner.lora={}", "roles={a: train}"]).adapters == []
