"""The calculator agent against a scripted HTTP server: an ordinary OpenAI agent, without a line of agl_ray."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import agent


def call(arguments: str, name: str = "calculator") -> dict[str, Any]:
    """An assistant message that calls a tool, with a field that the OpenAI client does not know."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "note": "kept",
        "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
    }


class Server(ThreadingHTTPServer):
    """Answers the n-th request with the n-th scripted message and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(json.loads(body))
        self.server.paths.append(self.path)
        message = self.server.script.pop(0)
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
        data = json.dumps({**answer, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server: Server, *script: dict[str, Any]) -> str:
    server.script = list(script)
    url = f"http://127.0.0.1:{server.server_port}/rollout/r/attempt/a/v1"
    return asyncio.run(agent.ask("what is 3 plus 4?", model="m", base_url=url, api_key="key"))


FINAL = {"role": "assistant", "content": "The answer is 7."}


def test_a_tool_call_and_an_answer(server: Server) -> None:
    asked = call('{"expression": "3+4"}')
    assert ask(server, asked, FINAL) == "The answer is 7."
    first, second = server.requests
    assert server.paths == ["/rollout/r/attempt/a/v1/chat/completions"] * 2
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["tools"] == agent.TOOLS
    assert second["messages"][2] == asked  # echoed as it came, unknown fields included
    assert second["messages"][3] == {"role": "tool", "tool_call_id": "call-1", "content": "7"}


def test_a_direct_answer_ends_it(server: Server) -> None:
    assert ask(server, FINAL) == "The answer is 7."
    assert len(server.requests) == 1


def test_three_turns_at_most(server: Server) -> None:
    assert ask(server, *[call('{"expression": "seven"}')] * 3) == ""
    assert server.requests[-1]["messages"][-1]["content"] == "error"
    assert len(server.requests) == 3


def test_the_client_survives_a_new_event_loop(server: Server) -> None:
    for _ in range(3):
        assert ask(server, FINAL) == "The answer is 7."


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("calculator", "not json"),
        ("calculator", "[1]"),
        ("calculator", "{}"),
        ("calculator", '{"expression": 5}'),
        ("search", '{"expression": "1+1"}'),
    ],
)
def test_bad_tool_calls_are_errors(name: str, arguments: str) -> None:
    assert agent.run_tool(name, arguments) == "error"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3+4", "7"),
        (" 47*385 ", "18095"),
        ("5-(2--3)", "0"),
        ("7//2", "3"),
        ("seven+4", "error"),
        ("1/0", "error"),
        ("1//0", "error"),
        ("2**9", "error"),
        ("True+1", "error"),
        ("1.5", "error"),
        ("047", "error"),
        ("", "error"),
        ("999999*999999", "999998000001"),
        ("9999999*9999999", "error"),
        ("(" * 300, "error"),
        ("__import__('os')", "error"),
        ("1+\x00", "error"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert agent.calculator(expression) == value


def test_the_agent_knows_nothing_of_us() -> None:
    tree = ast.parse(Path(agent.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [name for name in names if name.startswith(("agl", "ray", "actors"))]


def test_the_rollout_rewards_the_last_integer(server: Server) -> None:
    import agl_ray as agl
    from agl_ray.config.imports import load_object

    root = Path(agent.__file__).parents[2]
    calculator = load_object("examples/quickstart/rollout.py:calculator", root)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    llm = agl.LLM(endpoint=url, model="m", gateway=False)
    task = {"question": "what is 3 plus 4?", "answer": 7}
    for text, reward in (("It is 7.", 1.0), ("7 or 8", 0.0), ("no idea", 0.0), ("-7", 0.0)):
        server.script = [{"role": "assistant", "content": text}]
        assert asyncio.run(calculator(task, llm)) == reward
