"""A whole run whose store is in PostgreSQL and has its doors open: the journal is there, the doors answer, the password is nowhere."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agl_ray.cli import main
from agl_ray.config.store_address import masked
from tests.faults.whole_run import WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow
pytest_plugins = ["services"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(url: str, key: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_a_run_with_its_store_in_a_database_and_its_doors_open(
    tmp_path: Path,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    monkeypatch.setenv("AGL_STORE_API_KEY", "key-of-the-test")
    port = free_port()
    extra = ["store.door=true", f"gateway.port={port}", "train.steps=3"]
    run = WholeRun(tmp_path, make(tmp_path / "model"), extra).start()
    try:
        run.until(r"step 1/3")
        door = f"http://127.0.0.1:{port}/v1/agl"
        counts = ask(f"{door}/statistics", "key-of-the-test")
        assert counts["rollouts"] >= 16
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{door}/statistics", "another")
        assert run.finish() == 0, run.text
    finally:
        run.close()
    assert run.left_over() == []
    assert run.summary["updates"] == 3
    config = (run.run_folder / "config.json").read_text()
    assert json.loads(config)["store"]["url"] == masked(postgres_url)
    assert not (run.run_folder / "store.db").exists()
    assert main(["store", "ls", str(run.run_folder), "--json"]) == 0
    assert "succeeded" in capsys.readouterr().out
