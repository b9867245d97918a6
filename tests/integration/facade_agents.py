"""Agents as agent-lightning 1.0's documentation describes them: three environment variables and the variables of the task.

Nothing of ours is imported here. `Asking.run` is what 1.0's local runner imports and calls; `python facade_agents.py` is a program of
its own, with plain HTTP.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request


class Asking:
    """Asks twice in one conversation through an OpenAI client, grades the answer, reports one reward."""

    async def run(self) -> None:
        import httpx
        from openai import AsyncOpenAI

        key = os.environ["AGL_KEY"]
        client = AsyncOpenAI(base_url=os.environ["AGL_OPENAI_BASE_URL"], api_key=key)
        messages = [{"role": "user", "content": os.environ["QUESTION"]}]
        for _ in range(2):
            answer = await client.chat.completions.create(
                model="policy-of-the-server", messages=messages, temperature=0.7
            )
            text = answer.choices[0].message.content
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": "Are you sure?"},
            ]
        reward = float(os.environ["ANSWER"] in text)
        async with httpx.AsyncClient(timeout=120) as http:
            posted = await http.post(
                os.environ["AGL_EVENT_URL"],
                json={"event_type": "reward", "data": {"value": reward, "source": "agent"}},
                headers={"Authorization": f"Bearer {key}"},
            )
            posted.raise_for_status()


def post(url: str, content: object) -> dict:
    headers = {
        "Authorization": f"Bearer {os.environ['AGL_KEY']}",
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def main() -> int:
    messages = [{"role": "user", "content": os.environ["QUESTION"]}]
    url = os.environ["AGL_OPENAI_BASE_URL"] + "/chat/completions"
    text = post(url, {"model": "x", "messages": messages})["choices"][0]["message"]["content"]
    if "cannot" in text:
        return 3
    value = 1.0 if os.environ["ANSWER"] in text else 0.0
    post(os.environ["AGL_EVENT_URL"], {"event_type": "reward", "data": {"value": value}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
