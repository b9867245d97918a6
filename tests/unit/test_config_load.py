"""The loader: strict types, overrides, and one paragraph per mistake that names the key, what was expected and what was got."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_ray.config import RunConfig, load_config, resolved_json
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.config.schema import all_paths
from agl_ray.types import InputError
from agl_ray.types.errors import ConfigError

GOOD = """\
name: small
model:
  make: base.py:make
data:
  train: train.jsonl
  val: val.jsonl
rollout: {group_size: 8}
learner:
  lr: 2e-4
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(GOOD)
    return path


def wrong(path: Path, *overrides: str) -> str:
    """The message of the ConfigError that loading ends with; it is one paragraph."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def wrong_text(path: Path, text: str) -> str:
    path.write_text(text)
    return wrong(path)


def test_values_of_file_defaults_and_overrides(config_file: Path) -> None:
    config = load_config(config_file, ["train.steps=3", "cluster.address=10:30", "seed=7"])
    assert (config.name, config.rollout.group_size, config.learner.lr) == ("small", 8, 2e-4)
    assert (config.train.steps, config.cluster.address, config.seed) == (3, "10:30", 7)
    assert config.train.checkpoint_every == RunConfig.model_fields["train"].default.checkpoint_every


def test_an_override_sets_a_list_a_null_and_a_whole_section(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["learner.betas=[0.8, 0.9]", "model={path: models/tiny}", "store.url=null"],
    )
    assert config.learner.betas == (0.8, 0.9)
    assert (config.model.path, config.model.make, config.store.url) == ("models/tiny", None, None)


def test_a_row_may_be_as_long_as_a_conversation_unless_it_is_said(config_file: Path) -> None:
    assert load_config(config_file, ["engine.max_model_len=4096"]).learner.max_row_tokens == 4096
    more = ["engine.max_model_len=4096", "learner.lr=0.1"]
    assert load_config(config_file, more).learner.max_row_tokens == 4096
    more = ["engine.max_model_len=4096", "learner.max_row_tokens=2048"]
    assert load_config(config_file, more).learner.max_row_tokens == 2048
    assert load_config(config_file).rollout.max_tokens is None
    parts = ["engine.max_model_len", "expected a whole number"]
    message = wrong(config_file, "engine.max_model_len=long")
    assert all(part in message for part in parts)
    assert "max_row_tokens" not in message


def test_adapters_are_off_until_their_section_is_there(config_file: Path) -> None:
    assert load_config(config_file).learner.lora is None
    assert load_config(config_file, ["learner.lora={}"]).learner.lora == LearnerLoraConfig()
    lora = load_config(config_file, ["learner.lora.rank=8", "learner.lora.alpha=16"]).learner.lora
    assert lora == LearnerLoraConfig(rank=8, alpha=16.0)


def test_resolved_json_keeps_nulls_and_reads_back_equal(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["train.steps=3"])
    text = resolved_json(config)
    assert '"path": null' in text
    (tmp_path / "config.json").write_text(text)
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.group_sise=4", ["unknown key rollout.group_sise", "'group_size'"]),
        ("lr=3", ["unknown key lr", "learner.lr"]),
        ("trian.steps=3", ["unknown key trian", "'train'"]),
        ("train.steps.x=3", ["train.steps is a value, not a section"]),
        ("learner.lr=fast", ["learner.lr", "expected a number", "got 'fast'"]),
        ("learner.lr=-1", ["learner.lr", "more than 0", "got -1"]),
        ("learner.lr=.inf", ["learner.lr", "finite"]),
        ("train.steps=4.0", ["train.steps", "a whole number", "got 4.0"]),
        ("train.steps='4'", ["train.steps", "a whole number", "got '4'"]),
        ("seed=true", ["seed", "a whole number", "got true"]),
        ("weights.transport=ib", ["weights.transport", "'object_store'", "got 'ib'"]),
        ("learner.betas=[0.1]", ["learner.betas", "items"]),
        ("rollout=3", ["rollout", "a section", "got 3"]),
        ("rollout.timeout_seconds=null", ["rollout.timeout_seconds", "got null"]),
        ("name=a/b", ["name", "letters", "got 'a/b'"]),
        ("store.url=3", ["store.url", "a text or null", "got 3"]),
        ("learner.lora.rang=4", ["unknown key learner.lora.rang", "'rank'"]),
        ("learner.lora.dropout=0.1", ["unknown key learner.lora.dropout"]),
        ("learner.lora.rank=0", ["learner.lora.rank", "more than 0"]),
        ("learner.lora={target_modules: []}", ["learner.lora.target_modules", "at least 1 items"]),
        ("learner.lora=true", ["learner.lora", "a section"]),
        ("train.steps", ["no override", "key=value"]),
        ("gateway.port=[1", ["not YAML"]),
    ],
)
def test_a_wrong_override_names_itself(config_file: Path, override: str, parts: list[str]) -> None:
    message = wrong(config_file, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.path=x"], ["exactly one of model.path", "'model.path=x'"]),
        (["rollout.min_group=9"], ["rollout.min_group (9)", "rollout.group_size (8)"]),
        (["weights.transport=nccl"], ["weights.transport nccl", "engine.num_gpus"]),
        (
            ["cluster.address=a:1", "cluster.local_cpus=2"],
            ["cluster.local_cpus", "cluster.address"],
        ),
        (["engine.gpu_memory_utilization=0.5"], ["engine.gpu_memory_utilization has no effect"]),
    ],
)
def test_a_contradiction_names_both_keys(
    config_file: Path, overrides: list[str], parts: list[str]
) -> None:
    message = wrong(config_file, *overrides)
    for part in parts:
        assert part in message


def test_mistakes_in_the_file_name_their_line(config_file: Path) -> None:
    message = wrong_text(config_file, GOOD.replace("lr: 2e-4", "learning_rate: 2e-4"))
    assert "small.yaml, line 9: unknown key learner.learning_rate" in message
    message = wrong_text(config_file, GOOD.replace("group_size: 8", "group_size: 0"))
    assert "line 7" in message
    assert "rollout.group_size: expected more than 0, got 0" in message
    message = wrong_text(config_file, GOOD + "  lr: 1e-3\n")
    assert "line 10" in message
    assert "learner.lr is given twice, first in line 9" in message


def test_several_mistakes_are_all_named(config_file: Path) -> None:
    message = wrong(config_file, "seed=-1", "train.steps=0")
    assert message.startswith("2 problems: (1)")
    assert "seed" in message
    assert "train.steps" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "keys with values"),
        ("a: [1\n", "is not YAML"),
        ("? [a, b]\n: 1\n", "plain name"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
        ("name: x\n", "the key model is missing"),
    ],
)
def test_what_is_no_configuration(config_file: Path, text: str, part: str) -> None:
    assert part in wrong_text(config_file, text)


def test_a_missing_file_names_its_neighbours(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'small\.yaml'"):
        load_config(tmp_path / "smal.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(InputError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_every_key_is_documented() -> None:
    from agl_ray.config.schema import field_at, section_of

    for dotted in all_paths():
        field = field_at(tuple(dotted.split(".")))
        assert field is not None
        if section_of(field.annotation) is None:
            assert field.description, f"{dotted} has no documentation"
