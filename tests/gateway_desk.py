"""A whole gateway without Ray: its HTTP application over a door with a scripted engine and a store of dictionaries, and a caller.

Test code only; used by the tests of the dialects.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from gateway_fakes import FakeEngine, FakeStore

from agl_ray.gateway.door import Door, DoorSettings
from agl_ray.gateway.engine_api import GenerateResult
from agl_ray.gateway.http import GatewayApp
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import EngineRole, OutsideRole
from agl_ray.types import replace

BASE = "/rollout/ro-1/attempt/at-1"


class Desk:
    """`script` is FakeEngine's; `says` makes one entry of it. `roles`: beside `planner`, which is trained by the same engine."""

    def __init__(self, renderer: Renderer, script: Any, *, mode: str = "val", **options: Any):
        self.renderer = renderer
        self.store = FakeStore(mode, options.pop("metadata", None))
        self.engine = FakeEngine(script)
        self.roles: dict[str, EngineRole | OutsideRole] = {
            "planner": EngineRole(self.engine, renderer),
            **options.pop("roles", {}),
        }
        self.settings = DoorSettings(
            **{"max_model_len": 2000, "call_timeout_seconds": 60.0, **options}
        )
        self.restart()

    def restart(self) -> None:
        """The gateway process dies and another one takes over."""
        made = len(self.store.batches)
        self.store.attempt = replace(self.store.attempt, num_spans=made)
        self.door = Door(self.store, self.engine, self.renderer, self.settings, roles=self.roles)
        self.app = GatewayApp(self.door, self.renderer)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return asyncio.run(self.store.query_span_rows("ro-1"))

    def prompt(self, index: int = -1) -> str:
        """The text of the prompt that the engine got."""
        return self.renderer.decode(self.engine.requests[index].prompt_ids)

    def post(self, action: str, body: Any, **headers: str) -> httpx.Response:
        """The answer to a POST of JSON (or of raw bytes)."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
                return await client.post(f"{BASE}/{action}", content=content, headers=headers)

        return asyncio.run(send())

    def events(self, action: str, body: dict[str, Any]) -> list[Any]:
        """The data of the server-sent events of a streamed answer, in order."""
        answer = self.post(action, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in answer.text.split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])
            if "event" in fields:
                assert fields["event"] == data["type"]
            found.append(data)
        return found


def says(renderer: Renderer, text: str, stop: str | None = None, end: bool = True) -> Any:
    """An entry of an engine's script: these words, ended by the end-of-turn id, by a stop string, or cut by length."""
    ids = [*renderer.encode(text), *(renderer.stop_ids if end and stop is None else [])]
    return GenerateResult(
        response_ids=ids,
        logprobs=[-0.5] * len(ids),
        weight_versions=[(0, 7)],
        finish_reason="stop" if end else "length",
        stop_reason=stop,
        cached_tokens=4,
    )


def calls(expression: str, spaces: str = "  ") -> str:
    """A tool call in a spelling of the model's own."""
    arguments = '{"expression":"' + expression + '"}'
    return (
        '<tool_call>\n{"name":"calculator",'
        + spaces
        + '"arguments":'
        + arguments
        + "}\n</tool_call>"
    )
