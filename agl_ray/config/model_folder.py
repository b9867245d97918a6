"""Model folders: is it one, and where a made one is cached.

Called by the trainer and by `agl-ray check`. Test alone: tests/unit/test_config_model_folder.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from agl_ray.config.paths import find
from agl_ray.types.errors import InputError

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(path: Path, key: str = "model.path") -> None:
    """InputError naming `key` and what is missing unless `path` holds config.json, weights and a tokenizer."""
    if not path.is_dir():
        raise InputError(f"{key}: there is no folder {path}; give a Hugging Face model folder")
    have = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    if not (path / "config.json").is_file():
        raise InputError(
            f"{key}: {path} has no config.json, so it is no Hugging Face model folder; it has {have}"
        )
    if not any(list(path.glob(pattern)) for pattern in WEIGHTS):
        raise InputError(f"{key}: {path} has no weights (*.safetensors or *.bin); it has {have}")
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(
            f"{key}: {path} has no tokenizer (one of {', '.join(TOKENIZERS)}); it has {have}. "
            "Save it there with `tokenizer.save_pretrained(folder)`: the gateway renders and tokenises with it"
        )


def cached_model(recipe: str, base: Path, seed: int, cache_dir: Path) -> Path:
    """Where the model that `recipe` makes for `seed` is kept: a folder named by seed and by the content of the recipe's
    Python file and its neighbours, so that a changed recipe makes a new model."""
    place, _, name = recipe.rpartition(":")
    digest = hashlib.sha256(name.encode())
    path = find(place, base) if place.endswith(".py") else None
    if path is None:
        digest.update(place.encode())
    else:
        for source in sorted(path.parent.glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    stem = path.parent.name if path is not None else place.replace(".", "-")
    return cache_dir / "models" / f"{stem}-seed{seed}-{digest.hexdigest()[:12]}"
