"""The model of a learner from a Hugging Face folder, checked before anything heavy is loaded.

The one file that knows transformers' loading (tested with 5.16 to 5.19). Called by learner/step.py; `check_model_folder` also by
whoever wants to fail early, it needs neither torch nor transformers. Test it alone with tests/unit/test_learner_model.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agl_ray.types.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# A model that changes its logits after the output head: the log-probabilities taken in the head would be wrong.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
# Layers in which learner/attention.py says what a token sees. Others (recurrent ones, chunks) would mix the rows of a micro-batch, silently.
LAYERS = {"full_attention", "sliding_attention"}
CHECKED_ROW = 6  # tokens of each of the two rows that `load_model` runs; more than the recurrent layers' convolutions see


def check_model_folder(path: str | Path) -> Path:
    """The folder, if it holds a configuration, a tokenizer and weights; else InputError names the folder and the file."""
    folder = Path(path)
    advice = "give a folder written by save_pretrained of the model and of its tokenizer"
    if not folder.is_dir():
        raise InputError(f"model folder {folder}: expected a folder, found none; {advice}")
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {folder}: expected config.json, found none; {advice}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"model folder {folder}: expected a tokenizer ({', '.join(TOKENIZER_FILES)}), found none; {advice}"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise InputError(
            f"model folder {folder}: expected weights ({' or '.join(WEIGHT_PATTERNS)}), found none; {advice}"
        )
    _check_config(folder)
    return folder


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"model folder {folder}: config.json is not JSON: {error}") from error
    for name, neutral in LOGIT_CHANGES.items():
        value = config.get(name, neutral)
        if value not in (None, neutral):
            raise InputError(
                f"model folder {folder}: config.json says {name} = {value}; models that change their logits after the "
                "output head cannot be trained here"
            )
    others = sorted(set(config.get("layer_types") or ()) - LAYERS)
    if others:
        raise InputError(
            f"model folder {folder}: config.json says layer_types {', '.join(others)}; expected {' or '.join(sorted(LAYERS))}: in other layers "
            "the rows of a micro-batch would see each other, so that this model cannot be trained here"
        )


def load_model(path: str | Path, device: str = "cpu") -> Any:
    """The causal LM in float32 on `device`, dropout off, with attention kept inside each row (learner/attention.py)."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from agl_ray.learner import attention

    folder = check_model_folder(path)
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model folder {folder}: transformers cannot load it as a causal language model: {error}"
        ) from error
    if report["missing_keys"]:  # transformers would have drawn them at random and only warned
        raise InputError(
            f"model folder {folder}: expected weights for {sorted(report['missing_keys'])[0]}, found none in its files "
            f"({len(report['missing_keys'])} missing in all)"
        )
    model.set_attn_implementation(attention.NAME)
    model = model.eval().to(device)
    _check_rows_apart(model, folder)
    return model


def _check_rows_apart(model: Any, folder: Path) -> None:
    """InputError where a row's log-probabilities depend on the row before it in a micro-batch."""
    from agl_ray.learner import attention

    kind = model.config.model_type
    advice = (
        "rows of a micro-batch would see each other, so that this architecture cannot be trained here; take one with softmax attention alone "
        "(Qwen, Llama, Gemma 3, ...)"
    )
    used = model.config._attn_implementation
    if used != attention.NAME:  # transformers warns only
        raise InputError(
            f"model folder {folder}: model_type {kind}: expected attention that takes the implementation {attention.NAME}, got {used}: {advice}"
        )
    seen = _gradient_of_another_row(model)
    if seen > 0:
        raise InputError(
            f"model folder {folder}: model_type {kind}: expected a row's log-probabilities not to depend on the row before it, got a gradient of "
            f"{seen:.1e}: {advice}"
        )


def _gradient_of_another_row(model: Any) -> float:
    """The largest derivative of a row's log-probabilities by the embeddings of the row before it: exactly 0 where rows are apart.

    Comparing two forward passes would need a tolerance: a mixture of experts computes other products where the other row has other tokens.
    """
    import torch

    from agl_ray.learner.packing import pack, token_logprobs
    from agl_ray.trajectory.ragged import Rows

    embeddings = model.get_input_embeddings()
    ids = [i % embeddings.weight.shape[0] for i in range(2 * CHECKED_ROW)]
    weights = [[0.0] * CHECKED_ROW, [0.0] + [1.0] * (CHECKED_ROW - 1)]
    micro = pack(Rows.from_lists([ids[:CHECKED_ROW], ids[CHECKED_ROW:]], weights), len(ids))[0]
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.requires_grad_())
        return output.clone()  # which the model may change in place

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = embeddings.register_forward_hook(keep)
    try:
        for parameter in trained:  # the gradient of a large output head would be made and dropped
            parameter.requires_grad_(False)
        with torch.enable_grad():
            logprobs = token_logprobs(model, micro)
            (gradient,) = torch.autograd.grad(logprobs.sum(), embedded[:1])
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return float(gradient[0, :CHECKED_ROW].abs().max())
