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
    return model.eval().to(device)
