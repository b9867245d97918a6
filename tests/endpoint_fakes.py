"""A model outside, as an HTTP server on a thread of the test: OpenAI's chat API and Anthropic's messages API from a script.

Test code only. An entry of the script is a dictionary (the body of a 200), a (status, headers, body) triple, a list of events (streamed, in
the form of the URL's API; None cuts the connection there), or a function from the request's body to one of these. The last entry stays.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """What it was asked (`requests`: path, headers, body), when, and how many at once."""

    def __init__(self, script: list[Any]) -> None:
        self.script = list(script)
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        self.open = self.most_open = 0
        self.url = ""
        self._lock = threading.Lock()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.requests]

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Any:
        with self._lock:
            self.times.append(time.monotonic())
            self.requests.append((path, headers, body))
            entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        return entry(body) if callable(entry) else entry

    def left(self) -> None:
        with self._lock:
            self.open -= 1


@contextlib.contextmanager
def endpoint(*script: Any) -> Iterator[Endpoint]:
    """A server with this script; `url` is its root."""
    state = Endpoint(list(script))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            return

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            headers = {key.lower(): value for key, value in self.headers.items()}
            try:
                self.answer(state.take(self.path, headers, json.loads(raw)))
            finally:
                state.left()

        def answer(self, entry: Any) -> None:
            if isinstance(entry, list):
                self.stream(entry)
                return
            status, extra, body = entry if isinstance(entry, tuple) else (200, {}, entry)
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {**extra, "content-length": str(len(raw))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(raw)

        def stream(self, events: list[Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for event in events:
                if event is None:
                    return
                if callable(event):
                    event()
                    continue
                name = f"event: {event['type']}\n" if "type" in event else ""
                self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            if "chat" in self.path:
                self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"id": "x", "model": "gpt-far-0", "choices": [choice], "usage": usage}


def chat_events(*pieces: str, finish: str = "stop") -> list[dict[str, Any]]:
    """A streamed chat completion."""
    deltas = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    end = {"choices": [{"delta": {}, "finish_reason": finish}]}
    return [
        *deltas,
        end,
        {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": len(pieces)}},
    ]


def message(*blocks: dict[str, Any], stop: str = "end_turn") -> dict[str, Any]:
    """An answer of Anthropic's API."""
    usage = {"input_tokens": 7, "cache_read_input_tokens": 2, "output_tokens": 5}
    return {
        "type": "message",
        "model": "claude-far",
        "content": list(blocks),
        "stop_reason": stop,
        "usage": usage,
    }
