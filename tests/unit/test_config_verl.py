"""learner.backend verl: what it does not do is refused, and the message names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agl_ray.config import RunConfig
from agl_ray.config.algorithm import PRESETS, AlgorithmConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.config.verl import LOSSES, TAKEN_OF_ALGORITHM, TAKEN_OF_LEARNER, located_environment
from agl_ray.types import ConfigError


def made(**sections: Any) -> RunConfig:
    learner = {"backend": "verl", **sections.pop("learner", {})}
    return RunConfig.model_validate({"model": {"path": "m"}, "learner": learner, **sections})


def test_the_defaults_and_what_verl_takes_are_taken() -> None:
    assert made().learner.verl_env == ".venv-verl"
    made(
        learner={"world_size": 2, "minibatches": 2, "dtype": "bfloat16", "verl_env": "/opt/verl"},
        algorithm={"name": "gspo", "unit": "row", "correction": "tis", "entropy_coefficient": 0.1},
        trajectory={"rows": "per-call"},
    )
    assert set(LearnerConfig.model_fields) >= TAKEN_OF_LEARNER
    assert set(AlgorithmConfig.model_fields) >= TAKEN_OF_ALGORITHM


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"learner": {"lora": {}}}, r"learner\.lora: learner\.backend verl does not do it"),
        ({"learner": {"critic": {"lr": 7e-3}}}, r"learner\.critic"),
        ({"learner": {"optimizer": "muon"}}, r"learner\.optimizer"),
        ({"learner": {"cpu_offload": True, "num_gpus": 1.0}}, r"learner\.cpu_offload"),
        ({"algorithm": {"kl": {"coefficient": 0.1}}}, r"algorithm\.kl: "),
        ({"algorithm": {"name": "ppo"}}, r"algorithm\.advantage gae"),
        ({"algorithm": {"loss": "gmpo"}}, r"algorithm\.loss gmpo: .* has cispo, clip, gspo, sapo"),
        ({"algorithm": {"loss": "mine.py:loss"}}, r"algorithm\.loss mine\.py:loss"),
        ({"algorithm": {"name": "gspo"}}, r"algorithm\.unit rollout"),
        ({"algorithm": {"loss": "sapo"}}, r"algorithm\.aggregation token-mean"),
        ({"trajectory": {"rows": "tree"}}, r"trajectory\.rows tree"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        made(**sections)


def test_every_preset_runs_or_is_refused_by_a_field() -> None:
    taken = set()
    for name, switches in PRESETS.items():
        unit = {"unit": "row"} if "seq-" in str(switches.get("aggregation")) else {}
        given = {"algorithm": {"name": name, **unit}}
        known = switches.get("loss", "clip") in LOSSES
        if known and switches.get("advantage") not in ("gae", "none"):
            taken.add(made(**given).algorithm.loss)
        else:
            with pytest.raises(ValueError, match=r"algorithm\.(loss|advantage)"):
                made(**given)
    assert taken == set(LOSSES)


def test_its_environment_is_refused_where_another_backend_computes() -> None:
    with pytest.raises(
        ValueError, match=r"learner\.verl_env acts with learner\.backend: verl only"
    ):
        made(learner={"backend": "native", "verl_env": "elsewhere"})


def test_the_environment_is_found_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "configs"
    (base / "env").mkdir(parents=True)
    relative = LearnerConfig(backend="verl", verl_env="env")
    assert located_environment(relative, base).verl_env == str(base / "env")
    absolute = LearnerConfig(backend="verl", verl_env="/on/the/nodes")
    assert located_environment(absolute, base) is absolute
    native = LearnerConfig()
    assert located_environment(native, base) is native
    with pytest.raises(ConfigError, match=r"learner\.verl_env: .* found no nowhere; .*venv-verl"):
        located_environment(LearnerConfig(backend="verl", verl_env="nowhere"), base)
