"""Names that agent-lightning 0.3 gives to its spans and attributes, so that its readers read ours.

Called by the emitters and by whoever looks for what they wrote. A `<i>` counts from 0; reward 0 is the primary one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ANNOTATION_SPAN = "agentlightning.annotation"  # rewards too
MESSAGE_SPAN = "agentlightning.message"
OBJECT_SPAN = "agentlightning.object"
EXCEPTION_SPAN = "agentlightning.exception"
OPERATION_SPAN = "agentlightning.operation"

REWARD = "agentlightning.reward"  # .<i>.name, .<i>.value
LINK = "agentlightning.link"  # .<i>.key_match, .<i>.value_match: spans that have this attribute
TAG = "agentlightning.tag"  # .<i>
MESSAGE_BODY = "agentlightning.message.body"
OBJECT_TYPE = "agentlightning.object.type"
OBJECT_LITERAL = "agentlightning.object.literal"
OBJECT_JSON = "agentlightning.object.json"
OPERATION_NAME = "agentlightning.operation.name"
OPERATION_INPUT = "agentlightning.operation.input"
OPERATION_OUTPUT = "agentlightning.operation.output"

UNFINISHED = "agl.unfinished"  # true on a span that was still open when its attempt ended


def make_tag_attributes(tags: Iterable[str]) -> dict[str, Any]:
    """Attributes that put `tags` on a span."""
    return {f"{TAG}.{number}": tag for number, tag in enumerate(tags)}


def make_link_attributes(links: Mapping[str, str]) -> dict[str, Any]:
    """Attributes that point to the spans which have the attributes `links`, such as {"gen_ai.response.id": "chatcmpl-1"}."""
    attributes: dict[str, Any] = {}
    for number, (key, value) in enumerate(links.items()):
        attributes |= {
            f"{LINK}.{number}.key_match": key,
            f"{LINK}.{number}.value_match": value,
        }
    return attributes
