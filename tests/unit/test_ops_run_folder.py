"""Run folders: made, linked as latest, found again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agl_ray.config import RunConfig, load_config
from agl_ray.ops.run_folder import base_of, find_run, make_run_folder
from agl_ray.types import InputError


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    plain = {"name": "small", "runs_dir": tmp_path / "runs", "model": {"path": "m"}}
    return RunConfig.model_validate({**plain, "data": {"train": "a.jsonl", "val": "b.jsonl"}})


def test_a_folder_with_its_configuration(config: RunConfig, tmp_path: Path) -> None:
    folder = make_run_folder(config, tmp_path)
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("small-20")
    assert load_config(folder / "config.json") == config
    assert base_of(folder / "config.json") == tmp_path
    assert base_of(folder / "other.yaml") == folder
    assert (tmp_path / "runs" / "latest").resolve() == folder


def test_runs_of_the_same_second_have_their_own_folders(config: RunConfig) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: make_run_folder(config), range(16)))
    assert len(set(folders)) == 16
    link = config.runs_dir / "latest"
    assert link.is_symlink()
    assert link.resolve() in folders
    assert not list(config.runs_dir.glob(".latest-*"))


def test_a_run_is_found_by_path_by_name_and_as_latest(config: RunConfig) -> None:
    first, second = make_run_folder(config), make_run_folder(config)
    assert find_run(str(first)) == first.resolve()
    assert find_run(first.name, config.runs_dir) == first.resolve()
    assert find_run("latest", config.runs_dir) == second.resolve()
    with pytest.raises(InputError, match="did you mean"):
        find_run(first.name + "9", config.runs_dir)
    with pytest.raises(InputError, match="there is no run"):
        find_run("latest", config.runs_dir / "none")


def test_a_place_that_cannot_be_written(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"runs_dir": tmp_path / "file" / "runs"})
    with pytest.raises(InputError, match="runs_dir"):
        make_run_folder(blocked)
