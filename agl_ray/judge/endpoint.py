"""A model as a judge, behind an OpenAI-compatible endpoint: it is shown the work and answers with a score.

Who calls it: the judge actor. Test alone: tests/unit/test_judge_endpoint.py (a real HTTP server).
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from agl_ray.config.judge import JudgeConfig
from agl_ray.config.keys import endpoint_key
from agl_ray.judge.bench import AskAgain, JudgeFailed
from agl_ray.judge.case import Case, Verdict

PASSING = (408, 409, 429)  # besides 500 and above
_FORM = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}


class AskingModel:
    """`await asking(case)`. One session of HTTP, opened with the first question; `close` ends it."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._url = f"{(config.base_url or '').rstrip('/')}/chat/completions"
        self._key = endpoint_key("judge.api_key_env", config.api_key_env, config.base_url)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, case: Case) -> Verdict:
        """JudgeFailed where the endpoint refuses the question, AskAgain where another try may succeed."""
        if self._session is None:
            headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
            # The bench has the deadline, and bounds the connections.
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0),
            )
        try:
            async with self._session.post(self._url, json=self._body(case)) as answer:
                text = await answer.text()
                _check_status(answer, text, self._url)
        except aiohttp.ClientError as error:
            raise AskAgain(f"{self._url}: {type(error).__name__}: {error}") from error
        return self._read(text)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _body(self, case: Case) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": self._prompt(case)}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": _FORM, "strict": True},
            },
        }

    def _prompt(self, case: Case) -> str:
        """In one pass: what an agent wrote may look like a place to fill in."""
        low, high = self._config.scale
        messages = case.messages
        values = {
            "{task}": _text(case.task),
            "{conversation}": "\n\n".join(_spoken(message) for message in messages),
            "{answer}": _content(messages[-1]) if messages else "",
            "{low}": f"{low:g}",
            "{high}": f"{high:g}",
        }
        return filled(self._config.instructions, values)

    def _read(self, text: str) -> Verdict:
        try:
            said = json.loads(text)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise AskAgain(f"{self._url}: expected a chat completion, got {text:.200}") from error
        found = _object_in(said)
        score = found.get("score")
        low, high = self._config.scale
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not low <= score <= high
        ):
            raise AskAgain(
                f"{self._config.model}: expected a JSON object with a score from {low:g} to {high:g}, got {said:.200}"
            )
        return Verdict(
            reward=(score - low) / (high - low), comment=str(found.get("reason") or "") or None
        )


def filled(template: str, values: dict[str, str]) -> str:
    """`template` with every key of `values` in it replaced, never what came in with a value."""
    at = {key: template.find(key) for key in values if key in template}
    if not at:
        return template
    first = min(at, key=at.__getitem__)
    head, _, tail = template.partition(first)
    return head + values[first] + filled(tail, values)


def _check_status(answer: aiohttp.ClientResponse, text: str, url: str) -> None:
    if answer.status < 400:
        return
    why = f"{url}: status {answer.status}: {text:.200}"
    if answer.status not in PASSING and answer.status < 500:
        raise JudgeFailed(why)
    after = answer.headers.get("retry-after", "")
    raise AskAgain(why, float(after) if after.isdecimal() else 0.0)


def _object_in(said: str) -> dict[str, Any]:
    """The JSON object in a text; models put words or fences around it. Empty where there is none."""
    begin, end = said.find("{"), said.rfind("}")
    try:
        found = json.loads(said[begin : end + 1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _spoken(message: Any) -> str:
    role = message.get("role", "?") if isinstance(message, dict) else "?"
    return f"[{role}]\n{_content(message)}"


def _content(message: Any) -> str:
    """Text of a message; tool calls and parts that are no text as JSON."""
    if not isinstance(message, dict):
        return _text(message)
    parts = [_text(message["content"])] if message.get("content") else []
    if message.get("tool_calls"):
        parts.append(_text(message["tool_calls"]))
    return "\n".join(parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
