"""Roles that are engines of ours: each has its engine, tokenizer and session; only the trained one's calls may be learned from."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa
import pytest
from gateway_desk import Desk, says
from gateway_fakes import FakeEngine, save_model_folder

from agl_ray.gateway.door import Door
from agl_ray.gateway.http import GatewayApp
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import EngineRole
from agl_ray.trajectory.rows import build_rows

CHAT = "v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "1+1?"}]}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def desk(renderer: Renderer, **options: Any) -> tuple[Desk, FakeEngine]:
    frozen = FakeEngine(lambda request: says(renderer, "frozen"))
    role = EngineRole(frozen, renderer, "frozen")
    one = Desk(renderer, lambda request: says(renderer, "mine"), roles={"critic": role}, **options)
    return one, frozen


def test_each_role_has_its_engine_and_its_session(renderer: Renderer) -> None:
    one, frozen = desk(renderer, mode="train")
    said = [
        one.post(f"{role}{CHAT}", ASKED).json()["choices"][0]["message"]["content"]
        for role in ("", "role/critic/", "role/planner/", "role/critic/")
    ]
    assert said == ["mine", "frozen", "mine", "frozen"]
    assert (len(one.engine.requests), len(frozen.requests)) == (2, 2)
    assert [row["role"] for row in one.rows] == [None, "critic", "planner", "critic"]
    kinds = [row["attributes"].get("agl.role_kind") for row in one.rows]
    assert kinds == [None, "frozen", None, "frozen"]
    assert [row["parent_call"] for row in one.rows[:3]] == [None, None, None]
    assert one.rows[3]["parent_call"] == one.rows[1]["span_id"]


@pytest.mark.parametrize(
    "action", [CHAT, "v1/messages", "v1/responses", "v1/messages/count_tokens"]
)
def test_an_unknown_role_is_told_the_roles(renderer: Renderer, action: str) -> None:
    one, _ = desk(renderer)
    asked = {"model": "tiny", "input": "1+1?"} if "responses" in action else dict(ASKED)
    if action == "v1/messages":
        asked["max_tokens"] = 5
    found = one.post(f"role/plannner/{action}", asked)
    assert found.status_code == 404
    assert (
        "unknown role 'plannner': expected one of critic, planner"
        in found.json()["error"]["message"]
    )
    assert one.rows == []


def test_with_adapters_every_call_asks_for_its_roles_own(renderer: Renderer) -> None:
    one, frozen = desk(renderer)
    planner = EngineRole(one.engine, renderer, adapter="planner")
    roles = {**one.roles, "planner": planner}
    one.app = GatewayApp(Door(one.store, None, renderer, one.settings, roles=roles), renderer)
    for role in ("planner", "critic"):
        assert one.post(f"role/{role}/{CHAT}", ASKED).status_code == 200
    assert [request.adapter for request in one.engine.requests] == ["planner"]
    assert [request.adapter for request in frozen.requests] == [None]
    refused = one.post(CHAT, ASKED)
    assert refused.status_code == 404
    assert "every URL must name one of critic, planner" in refused.json()["error"]["message"]
    assert len(one.rows) == 2


def test_what_training_forbids_is_free_where_nothing_is_trained(renderer: Renderer) -> None:
    for name, value in (("top_p", 0.5), ("temperature", 0), ("presence_penalty", 1.0)):
        one, frozen = desk(renderer, mode="train")
        assert one.post(CHAT, {**ASKED, name: value}).status_code == 400
        assert one.post(f"role/planner/{CHAT}", {**ASKED, name: value}).status_code == 400
        assert one.post(f"role/critic/{CHAT}", {**ASKED, name: value}).status_code == 200
        assert getattr(frozen.requests[0], name) == value
    one, frozen = desk(renderer, mode="train")
    form = {"type": "json_object"}
    assert one.post(f"role/critic/{CHAT}", {**ASKED, "response_format": form}).status_code == 200
    assert frozen.requests[0].structure == {"json_object": True}


def test_only_calls_of_trained_roles_make_rows(renderer: Renderer) -> None:
    one, _ = desk(renderer, mode="train")
    for role in ("role/critic/", "", "role/critic/", "role/planner/"):
        assert one.post(f"{role}{CHAT}", ASKED).status_code == 200
    spans = pa.Table.from_batches(one.store.batches)
    built = build_rows(spans, [("ro-1", "at-1")])
    assert built.counts()["calls_frozen"] == 2
    trained = built.rows.ids[built.rows.weights > 0].tolist()
    assert trained == 2 * one.engine.script(None).response_ids


def test_the_session_of_a_role_survives_a_restart(renderer: Renderer) -> None:
    one, frozen = desk(renderer)
    first = one.post(f"role/critic/{CHAT}", ASKED).json()["choices"][0]["message"]
    one.restart()
    more = [*ASKED["messages"], first, {"role": "user", "content": "sure?"}]
    assert one.post(f"role/critic/{CHAT}", {**ASKED, "messages": more}).status_code == 200
    assert one.rows[1]["parent_call"] == one.rows[0]["span_id"]
    assert asyncio.run(one.door.state(_path()))["retokenized_tokens"] == 0
    assert (
        frozen.requests[1].prompt_ids[: len(frozen.requests[0].prompt_ids)]
        == frozen.requests[0].prompt_ids
    )


def _path() -> Any:
    from agl_ray.gateway.caller import CallPath

    return CallPath("ro-1", "at-1")
