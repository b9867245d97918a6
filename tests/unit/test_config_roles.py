"""The section `roles`: short words, sections, what does not fit a kind, overrides by name, keys from the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agl_ray.config import load_config, resolved_json
from agl_ray.config.roles import endpoint_keys, role_models
from agl_ray.types.errors import ConfigError

BASE = "model: {make: base.py:make}\ndata: {train: t.jsonl}\n"
JUDGE = "{kind: endpoint, base_url: 'https://x/v1', model: far, api_key_env: FAR_KEY}"
ROLES = f"roles:\n  planner: train\n  critic: frozen\n  old: {{kind: frozen, model: runs/x}}\n  judge: {JUDGE}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + text)
    return load_config(path, list(overrides))


def wrong(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_words_and_sections(tmp_path: Path) -> None:
    config = load(tmp_path, ROLES)
    kinds = {name: role.kind for name, role in config.roles.items()}
    assert kinds == {"planner": "train", "critic": "frozen", "old": "frozen", "judge": "endpoint"}
    assert role_models(config.roles) == {
        "planner": None,
        "critic": None,
        "old": None,
        "judge": "far",
    }
    again = load(tmp_path, "\n").model_validate(json.loads(resolved_json(config)))
    assert again.roles == config.roles


def test_overrides_by_name(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        ROLES,
        "roles.critic=train",
        "roles.judge.requests_per_minute=60.0",
        "roles.new=frozen",
    )
    assert (config.roles["critic"].kind, config.roles["new"].kind) == ("train", "frozen")
    assert config.roles["judge"].requests_per_minute == 60
    assert "roles.judge.requests_per_minut" in wrong(
        tmp_path, ROLES, "roles.judge.requests_per_minut=1"
    )


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("learned", "roles.a.kind: expected one of 'train', 'frozen' or 'endpoint', got 'learned'"),
        ("{kind: train, model: x}", "model acts for a role of kind frozen or endpoint only"),
        ("{kind: frozen, base_url: 'http://x'}", "base_url acts for a role of kind endpoint only"),
        ("{kind: endpoint, model: m}", "needs base_url"),
        ("{kind: endpoint, base_url: 'x/v1', model: m}", "expected http://... or https://..."),
        ("{kind: train, keey: 1}", "unknown key roles.a.keey"),
        ("{kind: frozen, replicas: 0}", "roles.a.replicas: expected more than 0, got 0"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, role: str, says: str) -> None:
    message = wrong(tmp_path, f"roles: {{a: {role}}}\n")
    assert says in message
    assert "c.yaml, line 3" in message


def test_names_are_those_of_a_url(tmp_path: Path) -> None:
    assert "roles" in wrong(tmp_path, "roles: {'a/b': train}\n")


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = load(tmp_path, ROLES).roles
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(
        ConfigError, match=r"roles\.judge\.api_key_env: expected the environment variable FAR_KEY"
    ):
        endpoint_keys(roles)
    monkeypatch.setenv("FAR_KEY", "sk-1")
    assert endpoint_keys(roles) == {"judge": "sk-1"}
    assert "sk-1" not in resolved_json(load(tmp_path, ROLES))
