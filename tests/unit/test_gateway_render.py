"""Renderer: the model folder's tokenizer and template, vLLM's own tool parser, streams that never cut a character."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from gateway_fakes import END, TOOL, save_model_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.render import Detokenizer, Renderer
from agl_ray.types import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer(folder, "hermes")


def test_text_and_ids_round_trip(renderer: Renderer) -> None:
    text = renderer.render([{"role": "user", "content": "caf\u00e9 \U0001f600 1+1"}], None)
    assert text.endswith("<|im_start|>assistant\n")
    assert renderer.decode(renderer.encode(text)) == text
    assert END in renderer.decode(renderer.encode(END))
    assert renderer.decode(renderer.encode(END), keep_special=False) == ""
    assert renderer.stop_ids == frozenset(renderer.encode(END))


def test_an_answers_text_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(folder)
    decoded: list[int] = []
    plain = renderer._text.__wrapped__
    monkeypatch.setattr(
        renderer, "_text", functools.lru_cache(4)(lambda ids: decoded.append(1) or plain(ids))
    )
    ids = renderer.encode("The answer is 432. <tool_call>")
    text = renderer.decode(ids)
    assert renderer.decode(ids, keep_special=False) == text
    assert len(decoded) == 1
    ended = [*ids, *renderer.stop_ids, *renderer.encode("x")]
    assert renderer.decode(ended, keep_special=False) == f"{text}x"
    assert renderer.decode(ended) == f"{text}{END}x"


def test_hermes_calls_are_found_by_vllms_parser(renderer: Renderer) -> None:
    text = 'Let me see.<tool_call>\n{"name":"calculator","arguments":{"expression":"1+1"}}\n</tool_call>'
    content, calls = renderer.find_tool_calls(text, [TOOL])
    assert content == "Let me see."
    assert [call.name for call in calls] == ["calculator"]
    assert json.loads(calls[0].arguments) == {"expression": "1+1"}
    assert calls[0].id.startswith("call_")


@pytest.mark.parametrize(
    "text", ["<tool_call>\n{oops\n</tool_call>", '<tool_call>{"name": "f"}</tool_call>', "no call"]
)
def test_a_malformed_call_comes_back_as_text(renderer: Renderer, text: str) -> None:
    assert renderer.find_tool_calls(text, [TOOL]) == (text, [])


@given(st.text(max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_says_what_the_whole_says(
    renderer: Renderer, text: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, 3))
    ids = renderer.encode(text)
    ids = ids[: len(ids) - cut]  # may end in the middle of a character
    stream = Detokenizer(renderer, keep_special=True)
    pieces = []
    while ids:
        size = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    pieces.append(stream.finish())
    whole = renderer.encode(text)
    assert "".join(pieces) == renderer.decode(whole[: len(whole) - cut])
    assert all("\ufffd" not in piece for piece in pieces[:-1]) or "\ufffd" in text


def test_a_conversation_that_the_template_refuses_is_a_400(tmp_path: Path) -> None:
    strict = save_model_folder(tmp_path / "strict", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Refusal, match="roles must alternate") as caught:
        Renderer(strict).render([{"role": "user", "content": "x"}], None)
    assert caught.value.status == 400


def test_bad_folders_say_what_to_do(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Renderer(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no tokenizer"):
        Renderer(empty)
    plain = save_model_folder(tmp_path / "plain", "")
    with pytest.raises(InputError, match="no chat template"):
        Renderer(plain)
    with pytest.raises(InputError, match=r"engine\.tool_parser.*hermes"):
        Renderer(folder, "nonsense")
