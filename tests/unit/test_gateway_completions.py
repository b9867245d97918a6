"""The completions dialect: raw prompts of text and of ids, what is recorded of them, and how they go on from one another."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_desk import Desk, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.dialects import completions
from agl_ray.gateway.render import Renderer
from agl_ray.types import EngineError

ACTION = "v1/completions"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def body(prompt: Any = "add A and", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 20, **fields}


def spelled(renderer: Renderer, text: str) -> list[int]:
    """The text in the ids of its characters, which the tokenizer itself would join."""
    return [token for letter in text for token in renderer.encode(letter)]


def test_the_body_of_an_answer(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, " B. ")])
    made = desk.post(ACTION, body(logprobs=1, return_token_ids=True, user="u")).json()
    (choice,) = made["choices"]
    assert (made["object"], made["id"][:5]) == ("text_completion", "cmpl-")
    assert (choice["text"], choice["finish_reason"], choice["index"]) == (" B. ", "stop", 0)
    ids = desk.rows[0]["response_ids"]
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == renderer.encode("add A and")
    assert choice["weight_versions"] == [[0, 7]]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]).startswith(" B. ")
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert logprobs["text_offset"][0] == 0
    assert made["usage"]["completion_tokens"] == len(ids)
    (row,) = desk.rows
    assert (row["dialect"], row["kind"]) == ("openai.completions", "call")
    assert row["attributes"]["agl.session"]["rest"] == "add A and"


@pytest.mark.parametrize("prompt", [["add A and"], [[1, 2, 3]], [1, 2, 3]])
def test_the_forms_of_a_prompt(renderer: Renderer, prompt: Any) -> None:
    desk = Desk(renderer, [says(renderer, "x")])
    assert desk.post(ACTION, body(prompt)).status_code == 200
    ids = renderer.encode("add A and") if isinstance(prompt[0], str) else [1, 2, 3]
    assert desk.engine.requests[0].prompt_ids == ids


@pytest.mark.parametrize("restart", [False, True])
def test_ids_that_go_on_from_an_earlier_call_are_recorded_as_its_suffix(
    renderer: Renderer, restart: bool
) -> None:
    sampled = spelled(renderer, "The answer is 432.")
    desk = Desk(renderer, [(sampled, "length"), says(renderer, "ok")], mode="train")
    start = renderer.encode("what is forty-seven plus 385?")
    more = renderer.encode(" add A")
    desk.post(ACTION, body(start))
    if restart:
        desk.restart()
    assert desk.post(ACTION, body([*start, *sampled, *more])).status_code == 200
    first, second = desk.rows
    assert second["parent_call"] == first["span_id"]
    assert second["parent_tokens"] == len(start) + len(sampled)
    assert second["prompt_ids"] == more
    assert desk.engine.requests[1].prompt_ids == [*start, *sampled, *more]
    assert second["attributes"]["agl.retokenized_tokens"] == 0
    assert "agl.branch_reason" not in second["attributes"]


def test_text_that_goes_on_from_an_earlier_call_keeps_its_ids(renderer: Renderer) -> None:
    sampled = spelled(renderer, "The answer")
    desk = Desk(renderer, [(sampled, "length"), says(renderer, "432."), says(renderer, "x")])
    text = desk.post(ACTION, body("47+385? ")).json()["choices"][0]["text"]
    desk.post(ACTION, body(f"47+385? {text} is"))
    first, second = desk.rows
    ids = desk.engine.requests[1].prompt_ids
    assert ids[: len(first["prompt_ids"]) + len(sampled)] == [*first["prompt_ids"], *sampled]
    assert second["attributes"]["agl.retokenized_tokens"] == 0
    desk.post(ACTION, body("another thing"))
    third = desk.rows[2]
    assert third["parent_call"] is None
    assert third["attributes"]["agl.branch_reason"] == "new_conversation"


def test_ids_made_of_the_answers_text_are_counted(renderer: Renderer) -> None:
    sampled = spelled(renderer, "The answer is 432.")
    desk = Desk(renderer, [(sampled, "length"), says(renderer, "x")])
    start = renderer.encode("47+385? ")
    desk.post(ACTION, body(start))
    desk.post(ACTION, body([*start, *renderer.encode("The answer is 432. add")]))
    second = desk.rows[1]["attributes"]
    assert second["agl.branch_reason"] == "echo_differs"
    assert second["agl.retokenized_tokens"] == len(sampled)


def test_an_agent_may_mix_dialects(renderer: Renderer) -> None:
    """A raw prompt that goes on from a chat, down to the ids; and a chat of the same attempt after it."""
    desk = Desk(renderer, [says(renderer, "two"), says(renderer, "four"), says(renderer, "six")])
    asked = [{"role": "user", "content": "1+1?"}]
    chat = {"model": "tiny", "messages": asked}
    desk.post("v1/chat/completions", chat)
    first = desk.rows[0]
    more = renderer.encode("\n<|im_start|>user\ntwice?<|im_end|>\n<|im_start|>assistant\n")
    desk.post(ACTION, body([*first["prompt_ids"], *first["response_ids"], *more]))
    answers = [{"role": "assistant", "content": "two"}, {"role": "user", "content": "twice?"}]
    last = [{"role": "assistant", "content": "four"}, {"role": "user", "content": "more?"}]
    desk.post("v1/chat/completions", {**chat, "messages": [*asked, *answers, *last]})
    _, second, third = desk.rows
    assert second["parent_call"] == first["span_id"]
    assert third["parent_call"] == second["span_id"]
    assert [row["attributes"]["agl.retokenized_tokens"] for row in desk.rows] == [0, 0, 0]
    assert [row["dialect"] for row in desk.rows] == [
        "openai.chat",
        "openai.completions",
        "openai.chat",
    ]


def test_a_stream(renderer: Renderer) -> None:
    entry = says(renderer, "one. Observation:", stop="Observation:")
    desk = Desk(renderer, [entry])
    asked = body(
        stop="Observation:",
        logprobs=0,
        return_token_ids=True,
        stream_options={"include_usage": True},
    )
    found = desk.events(ACTION, asked)
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"] == []
    assert found[-2]["usage"]["completion_tokens"] == len(entry.response_ids)
    chunks = [event["choices"][0] for event in found[:-2]]
    assert "".join(chunk["text"] for chunk in chunks) == "one. "
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == entry.response_ids
    logprobs = [one for chunk in chunks for one in chunk["logprobs"]["token_logprobs"]]
    assert logprobs == [-0.5] * len(entry.response_ids)
    offsets = [one for chunk in chunks for one in chunk["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [[1, [2]]]}, "prompt[0][1]"),
        ({"n": 0}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "s"}, "suffix"),
        ({"logprobs": 5}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"stop": 5}, "stop"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        completions.parse(json.dumps(body(**fields)).encode())
    assert caught.value.status == 400
    assert caught.value.param == param


def test_errors_are_openais(renderer: Renderer) -> None:
    desk = Desk(renderer, [EngineError("out of memory")])

    def code(asked: Any, status: int) -> Any:
        answer = desk.post(ACTION, asked)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.json()["error"]["code"]

    assert code(body(), 503) == "engine_error"
    assert code(b"{", 400) is None
    assert code(body([1, 10_000]), 400) == "invalid_value"
    assert code(body([-1]), 400) == "invalid_value"
    assert code(body(max_tokens=0), 400) == "invalid_value"
    assert code(body([5] * 3000), 400) == "context_length_exceeded"
    assert code(body(model="gpt"), 404) == "model_not_found"
