"""`agl-ray store rotate`: afterwards the newest key opens the store, older ones do not, and nothing of theirs is left in the file."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest

from agl_ray.cli import main
from agl_ray.ops.encryption import HEADER_BYTES, KEYS_VARIABLE, FieldCipher
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import EndReason

OLD, NEW = FieldCipher.new_key(), FieldCipher.new_key()


async def fill(url: str, settings: JournalSettings) -> str:
    core = await StoreCore.open(url, settings=settings)
    store = LightningStore.local(core)
    made = await store.start_rollout({"secret": 42})
    key = (made.rollout_id, made.attempt_id)
    row = {"rollout_id": key[0], "attempt_id": key[1], "span_id": "a", "name": "long" * 9000}
    row |= {"kind": "span", "start_ns": 1, "end_ns": 2, "status": "OK"}
    await store.add_spans(*key, span_batch([row]))
    await store.end_attempt(*key, EndReason.OK, reward=1.0)
    await core.close()
    return made.rollout_id


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["store", *words]) == code, capsys.readouterr()
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


def trace_of(algorithm: str, key: str) -> bytes:
    """How what `key` sealed begins, as it rests in the row of data keys: whole groups of three bytes in base64."""
    head = FieldCipher(algorithm, [key]).encrypt(b"x", "a")[:HEADER_BYTES]  # type: ignore[arg-type]
    return base64.b64encode(head[: HEADER_BYTES // 3 * 3])


@pytest.mark.parametrize("algorithm", ["aes-gcm", "fernet"])
@pytest.mark.parametrize("payload", ["journal", "outside"])
def test_the_newest_key_opens_it_and_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    algorithm: str,
    payload: str,
) -> None:
    file = tmp_path / "store.db"
    place = "journal" if payload == "journal" else f"file://{tmp_path}/payloads"
    settings = JournalSettings.from_environment({}, encryption=algorithm, payload=place)
    monkeypatch.setenv(KEYS_VARIABLE, OLD)
    rollout_id = asyncio.run(fill(f"sqlite:///{file}", settings))
    assert trace_of(algorithm, OLD) in file.read_bytes()
    options = ["--encryption", algorithm, *(["--payload", place] if payload != "journal" else [])]
    monkeypatch.setenv(KEYS_VARIABLE, f"{NEW},{OLD}")
    for _ in range(2):  # again does no harm
        assert "the newest key opens it" in said(capsys, "rotate", str(file), *options)
    assert trace_of(algorithm, OLD) not in file.read_bytes()
    monkeypatch.setenv(KEYS_VARIABLE, OLD)
    assert "add it at the end" in said(capsys, "ls", str(file), *options, code=2)
    monkeypatch.setenv(KEYS_VARIABLE, NEW)
    words = ["show", rollout_id, "--run", str(file), "--json", *options]
    shown = json.loads(said(capsys, *words))
    assert shown["input"] == {"secret": 42}
    assert shown["attempts"][0]["spans"][0]["name"] == "long" * 9000


def test_what_cannot_be_sealed_anew_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv(KEYS_VARIABLE, OLD)
    asyncio.run(fill(url, JournalSettings(encryption="aes-gcm")))
    assert "not encrypted" in said(capsys, "rotate", url, code=2)
    monkeypatch.setenv(KEYS_VARIABLE, NEW)
    options = ["--encryption", "aes-gcm"]
    assert "add it at the end" in said(capsys, "rotate", url, *options, code=2)
    monkeypatch.delenv(KEYS_VARIABLE)
    assert "holds no key" in said(capsys, "rotate", url, *options, code=2)
    assert "running store" in said(capsys, "rotate", "http://127.0.0.1:1", code=2)
    monkeypatch.setenv(KEYS_VARIABLE, f"{NEW},{OLD}")

    async def while_it_lives() -> None:
        core = await StoreCore.open(url, settings=JournalSettings(encryption="aes-gcm"))
        words = ["rotate", url, *options]
        assert "is alive" in await asyncio.to_thread(said, capsys, *words, code=2)
        await core.close()

    asyncio.run(while_it_lives())
