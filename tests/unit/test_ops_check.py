"""The checks of a machine: each finding from given facts, and the whole on this machine."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from agl_ray.config import RunConfig
from agl_ray.ops import check
from agl_ray.ops.memory import available_gib, needed_gib
from agl_ray.types import InputError


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    plain = {"runs_dir": tmp_path / "runs", "cache_dir": tmp_path / "cache", "model": {"path": "m"}}
    return RunConfig.model_validate({**plain, "data": {"train": "a.jsonl", "val": "b.jsonl"}})


def test_every_finding_that_is_not_ok_says_how_to_mend_it(config: RunConfig) -> None:
    findings = list(check.machine_findings(config))
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    for finding in findings:
        assert finding.state == "ok" or finding.mend


def test_python() -> None:
    assert check.python_version((3, 11, 7)).state == "ok"
    old = check.python_version((3, 10, 2))
    assert (old.state, "3.11" in old.mend) == ("problem", True)


def test_versions_against_the_tested_range() -> None:
    assert check._in_range("x", ">=2,<3", "2.5").state == "ok"
    assert check._in_range("torch", ">=2.11,<2.14", "2.13.0+cpu").state == "ok"
    outside = check._in_range("x", ">=2,<3", "3.0")
    assert outside.state == "problem"
    assert "tested range" in outside.text
    assert check._in_range("x", ">=2", None).text.startswith("not installed")


def test_the_build_of_torch() -> None:
    assert check.cuda_of("cuda: Optional[str] = None\nhip = None\n") is None
    assert check.cuda_of("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n") == "13.0"
    assert check.judge_torch_build(None, gpu=False).state == "ok"
    assert check.judge_torch_build("13.0", gpu=True).state == "ok"
    assert "num_gpus" in check.judge_torch_build(None, gpu=True).text


def test_threads() -> None:
    assert check.threads("1", 2).state == "ok"
    assert check.threads(None, 2).state == "ok"
    assert check.threads("2", 2).state == "note"


def test_memory(tmp_path: Path, config: RunConfig) -> None:
    needs = {"learner": 3.0, "critic": 2.0}
    enough = check.memory(needs, 8.0)
    assert enough.state == "ok"
    assert enough.text == "8.0 GiB available, a run needs about 5.0 GiB (learner 3.0, critic 2.0)"
    assert check.memory(needs, 4.0).state == "problem"
    assert check.memory(needs, None).state == "note"
    two = config.model_copy(update={"engine": config.engine.model_copy(update={"replicas": 2})})
    assert total(two) > total(config) >= total(None) > 1
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    assert available_gib(meminfo, tmp_path) == 4.0
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert available_gib(meminfo, tmp_path) == 2.0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_gib(meminfo, tmp_path) == 4.0
    assert available_gib(tmp_path / "nothing", tmp_path) is None


def total(config: RunConfig | None) -> float:
    return sum(needed_gib(config).values())


def test_the_memory_of_critic_and_reference(tmp_path: Path) -> None:
    """Of a model of 2**28 parameters: 1 GiB as float32."""
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"shape": [2**14, 2**14]}}).encode()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)

    def needs(**sections: Any) -> dict[str, float]:
        given = {"model": {"path": "m"}, "rollout": {"min_group": 2}, **sections}
        return needed_gib(RunConfig.model_validate(given), tmp_path)

    plain = needs()
    assert plain["learner"] == pytest.approx(
        0.8 + 4 + 1
    )  # weights, gradient, two moments; a copy to send
    assert plain["engines"] == pytest.approx(2.6 + 0.25 + 1)
    assert plain.keys() == {"services", "engines", "learner", "runners"}
    ppo = {"name": "ppo", "kl": {"coefficient": 0.1}}
    three = needs(algorithm=ppo)
    assert (three["critic"], three["reference"]) == (pytest.approx(4.0), pytest.approx(1.0))
    adapters = needs(algorithm=ppo, learner={"lora": {}})
    assert "reference" not in adapters
    assert (adapters["learner"], adapters["critic"]) == (pytest.approx(2.8), pytest.approx(4.0))
    assert needs(learner={"optimizer": "muon"})["learner"] == pytest.approx(4.8)
    on_gpu = needs(algorithm=ppo, learner={"num_gpus": 1.0})
    assert (on_gpu["critic"], on_gpu["reference"]) == (0.0, 0.0)
    offloaded = needs(algorithm=ppo, learner={"num_gpus": 1.0, "cpu_offload": True})
    assert (offloaded["critic"], offloaded["learner"]) == (pytest.approx(4.0), pytest.approx(5.8))
    finding = check.memory(three, 5.0)
    assert "learner 5.8, critic 4.0, reference 1.0" in finding.text
    assert "reference `base` needs no second model" in finding.mend
    (tmp_path / "m" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="expected a safetensors file"):
        needs()


def test_disks_and_shared_memory(tmp_path: Path, config: RunConfig) -> None:
    assert check.disk("runs", tmp_path / "not" / "yet" / "there").state == "ok"
    (tmp_path / "file").write_text("")
    assert check.disk("runs", tmp_path / "file" / "runs").state == "problem"
    assert check.shared_memory(config, tmp_path / "none").state == "note"
    huge = config.cluster.model_copy(update={"object_store_mib": 2**40})
    found = check.shared_memory(config.model_copy(update={"cluster": huge}), tmp_path)
    assert found.state == "problem"
    assert "--shm-size" in found.mend


def test_temp_path_and_open_files() -> None:
    assert check.temp_path("/tmp").state == "ok"
    long = check.temp_path("/tmp/" + "x" * 50)
    assert (long.state, long.mend) == ("problem", "export RAY_TMPDIR=/tmp")
    assert check.open_files(1024).state == "ok"
    assert check.open_files(256).state == "problem"


def test_a_port_in_use() -> None:
    assert check.gateway_port("127.0.0.1", 0).state == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = check.gateway_port("127.0.0.1", taken.getsockname()[1])
    assert found.state == "problem"
    assert "gateway.port" in found.mend
    if os.getuid():
        assert check.gateway_port("127.0.0.1", 1).state == "problem"
