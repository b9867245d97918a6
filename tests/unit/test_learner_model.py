"""Model folders that cannot be used: one sentence that names the folder and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learner_data import model_folder
from safetensors.torch import load_file, save_file

from agl_ray.learner import attention
from agl_ray.learner.model import check_model_folder, load_model
from agl_ray.types import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def test_a_good_folder_loads_in_float32(folder: Path) -> None:
    assert check_model_folder(folder) == folder
    model = load_model(folder)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert not model.training


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "config.json"),
        (["tokenizer.json"], "tokenizer"),
        (["model.safetensors"], "weights"),
    ],
)
def test_a_missing_file_is_named(folder: Path, files: list[str], message: str) -> None:
    for name in files:
        (folder / name).unlink()
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert error.value.exit_code == 2


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        load_model(tmp_path / "nowhere")


def test_a_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_model(folder)


def test_a_model_that_is_unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "never-heard-of"}))
    with pytest.raises(InputError, match="cannot load it"):
        load_model(folder)


def test_weights_that_do_not_belong_to_the_configuration(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="cannot load it"):
        load_model(folder)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_model(folder)


def test_a_model_whose_layers_would_mix_the_rows_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    mixed = {**config, "layer_types": ["linear_attention", "full_attention"]}
    (folder / "config.json").write_text(json.dumps(mixed))
    with pytest.raises(
        InputError, match=r"layer_types linear_attention; expected full_attention or"
    ):
        load_model(folder)


def test_a_model_that_changes_its_logits_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    with pytest.raises(InputError, match="final_logit_softcapping"):
        load_model(folder)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def random_folder(folder: Path, model_type: str, sizes: dict[str, Any]) -> Path:
    """A random model of this architecture; its tokenizer is an empty file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, dtype="float32")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        # Layers of these are nowhere in `layer_types`; of the first, transformers keeps the attention that it had.
        ("falcon", {**SIZES, "alibi": False}, "agl_blocks, got sdpa"),
        ("falcon_h1", {**GROUPED, **MAMBA, "mamba_d_ssm": 64, "head_dim": 8}, "got a gradient of"),
        ("bamba", {**GROUPED, **MAMBA, "attn_layer_indices": [1]}, "got a gradient of"),
        ("recurrent_gemma", {**GROUPED, "lru_width": 32}, "got a gradient of"),
    ],
)
def test_an_architecture_in_which_packed_rows_see_each_other_is_refused(
    tmp_path: Path, model_type: str, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"model_type {model_type}: .*{message}.* take one with"):
        load_model(random_folder(tmp_path / "model", model_type, sizes))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gemma3_text", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
        ("qwen3_moe", {**GROUPED, **EXPERTS, "head_dim": 8}),
    ],
)
def test_an_architecture_that_keeps_them_apart_loads_as_it_was(
    tmp_path: Path, model_type: str, sizes: dict[str, Any]
) -> None:
    model = load_model(random_folder(tmp_path / "model", model_type, sizes))
    assert model.config._attn_implementation == attention.NAME
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
