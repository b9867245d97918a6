"""What the gateway's processes are told: the key of their calls, and by what the engine's replicas keep a rollout's calls together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway_desk import BASE, Desk, says
from gateway_fakes import save_model_folder

from actors.engine import affinity
from actors.gateway import gateway_key
from agl_ray.config.models import RunConfig
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.render import Renderer
from agl_ray.types import ConfigError

TURNS = [{"role": "user", "content": "1+1?"}]


def config(**gateway: Any) -> RunConfig:
    given = {"model": {"path": "x"}, "data": {"train": "x", "val": "x"}, "gateway": gateway}
    return RunConfig.model_validate(given)


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTS_KEY", raising=False)
    assert gateway_key(config()) is None
    named = config(api_key_env="AGENTS_KEY")
    for wrong in (None, "", " the-key", "cl\u00e9"):
        if wrong is not None:
            monkeypatch.setenv("AGENTS_KEY", wrong)
        with pytest.raises(ConfigError, match=r"gateway\.api_key_env.*AGENTS_KEY"):
            gateway_key(named)
    monkeypatch.setenv("AGENTS_KEY", "the-key")
    assert gateway_key(named) == "the-key"


def test_sessions_need_several_replicas() -> None:
    assert affinity(1) == {}
    (router,) = affinity(2).values()
    assert router.get_request_router_class().__name__ == "ConsistentHashRouter"


def test_prefix_cache_hits_are_counted(tmp_path: Path) -> None:
    """On the call's span, over the attempt, and by a gateway that took over; and the engine is told whose calls these are."""
    renderer = Renderer(save_model_folder(tmp_path / "model"))
    desk = Desk(renderer, [says(renderer, text) for text in "ab"])
    for _ in range(2):
        assert desk.post("v1/chat/completions", {"model": "tiny", "messages": TURNS}).is_success
    assert [row["attributes"]["agl.cached_tokens"] for row in desk.rows] == [4, 4]
    assert {request.session for request in desk.engine.requests} == {"ro-1"}
    path = CallPath(*BASE.split("/")[2::2])
    assert asyncio.run(desk.door.state(path))["cached_tokens"] == 8
    desk.restart()
    assert asyncio.run(desk.door.state(path))["cached_tokens"] == 8
