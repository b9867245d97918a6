"""An attempt's conversation, read back from its call spans, for people to look at.

Calls carry only the messages that are new (`messages_from`, see record.py); here they are put together again, each with the call that it
goes on from: several roles may talk in turns. A raw prompt, which
has no messages, is shown as one message of role `prompt`: its text from the call that it goes on from. Called by the session for the examples of the summary. Test alone: tests/unit/test_gateway_conversation.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from agl_ray.spans import KIND_CALL


def conversation(spans: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an attempt's last conversation, the model's last answer included.

    spans: rows of the attempt in order of `sequence_id`, as `LightningStore.query_span_rows` gives them; spans that are no calls
    are passed over. An agent that opened several conversations shows the one it ended with.
    """
    messages: list[dict[str, Any]] = []
    conversations: dict[str | None, list[dict[str, Any]]] = {}  # by call id, its answer included
    for span in spans:
        if span["kind"] != KIND_CALL:
            continue
        attributes = dict(span["attributes"])
        request, response = _value(attributes["request"]), _value(attributes["response"])
        before = conversations.get(span["parent_call"], [])
        if request["messages"]:
            messages = [*before[: request["messages_from"]], *request["messages"], response]
        else:
            given = {"role": "prompt", "content": _value(attributes["agl.session"])["rest"]}
            messages = [*before, given, response]
        conversations[span["span_id"]] = messages
    return messages


def _value(value: Any) -> Any:
    """A JSON object or list: text in Arrow; some readers hand it out decoded."""
    return json.loads(value) if isinstance(value, str | bytes) else value
