"""Adapters of roles in a real vLLM engine: what each says equals peft, and one that vLLM does not take whole is an error that names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine_vllm import adapter_settings, lora_request, lora_slot_rank
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.learner import lora
from agl_ray.learner.model import load_model
from agl_ray.learner.weights import delivered
from agl_ray.types.errors import InputError
from tests.integration import tiny_model

pytestmark = pytest.mark.slow

PROMPT = [40 + i % 60 for i in range(70)]
CONFIG = LearnerLoraConfig(rank=3, alpha=6, rank_stabilized=True, per_role=True)
IDS = {"critic": 1, "planner": 2}


class Engine:
    """vLLM in this process, and the learner's model whose adapters it should have."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        self.model = load_model(folder)
        lora.add_adapters(self.model, CONFIG, 0, list(IDS))
        self.version = 0
        self.llm = LLM(
            model=str(folder), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, block_size=32,
            kv_cache_memory_bytes=1 << 26, enable_lora=True, max_loras=2, max_cpu_loras=2,
            max_lora_rank=lora_slot_rank(CONFIG.rank), logprobs_mode="processed_logprobs", disable_log_stats=True,
        )  # fmt: skip

    def change(self, role: str) -> None:
        """Other values, large enough to be heard."""
        torch.manual_seed(self.version + 1)
        with torch.no_grad():
            for parameter in lora.parts(self.model)[role]:
                parameter.add_(0.1 * torch.randn_like(parameter))

    def deliver(self, tensors: list[tuple[str, torch.Tensor]] | None = None) -> None:
        from agl_ray.weights.vllm_adapters import load_adapters

        settings = adapter_settings(CONFIG)

        def load(worker: Any) -> None:
            load_adapters(worker.model_runner, given, IDS, settings)

        given = delivered(self.model) if tensors is None else tensors
        self.llm.collective_rpc(load)
        self.llm.reset_prefix_cache()
        self.version += 1

    def says(self, role: str | None) -> tuple[list[int], torch.Tensor, int]:
        """Greedy ids, their log-probabilities, and how many tokens of the prompt were cached."""
        from vllm import SamplingParams

        request = None if role is None else lora_request(role, IDS[role], self.version)
        params = SamplingParams(temperature=0.0, max_tokens=10, logprobs=0, ignore_eos=True)
        prompt = {"prompt_token_ids": PROMPT}
        (output,) = self.llm.generate([prompt], params, lora_request=request, use_tqdm=False)
        said = output.outputs[0]
        ids = list(said.token_ids)
        logprobs = [said.logprobs[i][token].logprob for i, token in enumerate(ids)]
        return ids, torch.tensor(logprobs), output.num_cached_tokens

    def off(self, role: str | None) -> float:
        """Largest |difference| of its log-probabilities from the learner's for the same role (None: the base)."""
        ids, got, _ = self.says(role)
        whole = torch.tensor([PROMPT + ids])
        lora.act_as(self.model, role)
        with torch.no_grad():
            if role is None:
                with lora.adapters_off(self.model):
                    logits = self.model(input_ids=whole, use_cache=False).logits
            else:
                logits = self.model(input_ids=whole, use_cache=False).logits
        table = torch.log_softmax(logits[0, len(PROMPT) - 1 : -1], -1)
        return float((table[range(len(ids)), ids] - got).abs().max())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
        yield Engine(tiny_model.make(tmp_path_factory.mktemp("model") / "a"))


def test_each_role_says_what_its_adapter_says(engine: Engine) -> None:
    engine.change("planner")
    engine.change("critic")
    engine.deliver()
    assert all(engine.off(role) < 1e-4 for role in (None, *IDS))
    first = {role: engine.says(role)[1] for role in (None, *IDS)}
    assert engine.says("critic")[2] > 0  # its own cache, which no other role has filled
    assert (first["critic"] - first["planner"]).abs().max() > 1e-2
    assert (first["critic"] - first[None]).abs().max() > 1e-2
    engine.change("planner")
    engine.deliver()
    _, planner, cached = engine.says("planner")
    assert cached == 0
    assert (planner - first["planner"]).abs().max() > 1e-2
    assert torch.equal(engine.says("critic")[1], first["critic"])
    assert all(engine.off(role) < 1e-4 for role in (None, *IDS))


def test_an_adapter_that_is_not_taken_whole_is_named(engine: Engine) -> None:
    state = delivered(engine.model)
    layer = "planner/base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert layer in dict(state)
    wrong = {
        r"roles critic, planner, got those of critic$": [t for t in state if t[0].startswith("c")],
        r"adapter of role planner: vLLM gives no adapter to the layer of .*layers\.9": [
            *state,
            *(
                (name.replace("layers.0", "layers.9"), t)
                for name, t in state
                if "r/base" in name and "layers.0" in name
            ),
        ],
        r"adapter of role planner was not taken by vLLM.*quux": [
            *state,
            (layer.replace("q_proj", "quux"), dict(state)[layer]),
        ],
    }
    for message, tensors in wrong.items():
        with pytest.raises(Exception, match=message):
            engine.deliver(tensors)
    engine.deliver()
    assert engine.off("planner") < 1e-4


def test_a_slot_that_holds_other_values_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if vLLM's loader had passed over what it was given: the engine would answer with what it had."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "add_adapter", lambda *_: True)
    engine.change("critic")
    with pytest.raises(Exception, match="role critic: vLLM's slot does not hold the delivered"):
        engine.deliver()


def test_ranks_that_vllm_cannot_hold_are_refused() -> None:
    assert [lora_slot_rank(rank) for rank in (1, 2, 16, 17, 512)] == [1, 8, 16, 32, 512]
    with pytest.raises(InputError, match=r"learner.lora.rank: expected at most 512.*got 513"):
        lora_slot_rank(513)
