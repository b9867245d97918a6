"""Model folders that cannot be used: one sentence that names the folder and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from learner_data import model_folder
from safetensors.torch import load_file, save_file

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
