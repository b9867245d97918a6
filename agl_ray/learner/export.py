"""A trained model as a Hugging Face folder: safetensors, configuration, and the tokenizer it was trained with.

With adapters (learner.lora) the model is the merged one, and its folder `adapter` holds the adapters alone in peft's format. With
learner.lora.per_role there is such a model folder for each role, under its name: each is what `roles.NAME.model` of a later run takes.

Called by learner/step.py and learner/sft_run.py and, in parts, by learner/verl_engine.py. Test it alone with tests/unit/test_learner_export.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agl_ray.learner import lora
from agl_ray.learner.weights import full_state

ADAPTER_FOLDER = "adapter"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
)


def export(model: Any, source: Path, path: str | Path, *, write: bool = True) -> None:
    """Write the model to the folder `path`, with the tokenizer files of the folder `source` byte for byte.

    A collective: all ranks call it, only the one with `write` writes. The folder appears whole or not at all; one that is there is replaced.
    """
    target = Path(path)
    partial = new_partial(target) if write else None
    adapters = lora.adapter_states(model, keep=write)
    roles: list[str | None] = [*lora.roles_of(model)] or [None]
    for role in roles:
        state = dict(full_state(model, keep=write, role=role))
        if partial is None:
            continue
        folder = partial if role is None else partial / role
        folder.mkdir(exist_ok=True)
        copy_tokenizer(source, folder)
        model.config.save_pretrained(folder)
        save_tensors(state, folder)
        if adapters:
            lora.write_adapter(model, adapters[role], folder / ADAPTER_FOLDER, role)
    if partial is not None:
        put_in_place(partial, target)


def export_adapter(model: Any, path: str | Path, *, write: bool = True) -> None:
    """Write the only adapter of `model` alone to the folder `path`/adapter, as `export` does beside the merged model."""
    adapters = lora.adapter_states(model, keep=write)
    if not write:
        return
    target = Path(path)
    partial = new_partial(target)
    lora.write_adapter(model, adapters[None], partial / ADAPTER_FOLDER)
    put_in_place(partial, target)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer files of the folder `source`, byte for byte."""
    for pattern in TOKENIZER_PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def save_tensors(state: dict[str, Any], folder: Path) -> None:
    """Whole CPU tensors by name, as safetensors."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, folder, max_shard_size="5GB")


def new_partial(target: Path) -> Path:
    """An empty folder beside `target`, whose name no reader takes for a complete one."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; one that is there is moved aside first and then removed."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.exists():
        shutil.rmtree(old)
