"""Logging: JSON lines, and no key in them."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from agl_ray.ops.log import FILE_NAME, Masker, setup_logging


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("key sk-proj-abcdefgh12345678 used", "key sk-*** used"),
        ("Authorization: Bearer abc.def-ghi123", "Authorization: Bearer ***"),
        ("api_key='abcdef123456', next", "api_key='***', next"),
        ('{"token": "abcdefgh"}', '{"token": "***"}'),
        ("HF_TOKEN=hf_abcdefghijkl x", "HF_TOKEN=*** x"),
        ("postgres://user:pass@host/db", "postgres://user:***@host/db"),
        ("tokens/s 1200, max_tokens=40", "tokens/s 1200, max_tokens=40"),
    ],
)
def test_keys_are_masked_by_shape(text: str, masked: str) -> None:
    assert Masker().mask(text) == masked


def test_keys_are_masked_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-own-value")
    monkeypatch.setenv("SHORT_KEY", "abc")
    masker = Masker(["very-own-value-longer"])
    assert masker.mask("a very-own-value b very-own-value-longer abc") == "a *** b *** abc"


def test_lines_are_json_and_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, process="driver")
    setup_logging(tmp_path, process="driver")
    log = logging.getLogger("agl_ray.somewhere")
    log.info("quiet %s", "sk-abcdefgh12345678")
    try:
        raise ValueError("Bearer abcdefghijk")
    except ValueError:
        log.exception("loud")
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [line["message"] for line in lines] == ["quiet sk-***", "loud"]
    assert lines[0]["level"] == "info"
    assert "Bearer ***" in lines[1]["error"]
    screen = capsys.readouterr().err
    assert "quiet" not in screen
    assert screen.count("error agl_ray.somewhere: loud") == 1
    assert "abcdefghijk" not in screen


def test_lines_go_to_what_stderr_is_when_they_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        first = io.StringIO()
        patched.setattr("sys.stderr", first)
        setup_logging(None)
        first.close()  # as a notebook's cell or a test's capture does when it ends
    logging.getLogger("agl_ray.somewhere").warning("still heard")
    assert capsys.readouterr().err.endswith("warning agl_ray.somewhere: still heard\n")
