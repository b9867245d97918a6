"""The Arrow schema of a span (DESIGN section 5): one row per span, typed columns.

A model call carries exact token ids. Where a call continues an earlier call of the same attempt, `parent_call` names
that call's span id, `parent_tokens` says how many leading tokens of the parent's *sequence* (prompt + response) are
shared, and `prompt_ids` holds only the tokens after them; so a long shared prompt is stored once per attempt.
"""

from __future__ import annotations

import pyarrow as pa

KIND_CALL = "call"  # a model call recorded by the gateway
KIND_REWARD = "reward"
KIND_SPAN = "span"  # anything else: tool, operation, message, ...

ROLE_KIND = "agl.role_kind"
"""Attribute of a call whose role is not trained: `frozen` or `endpoint`; a call of a trained role has none."""

STRING_MAP = pa.map_(pa.string(), pa.string())  # values are JSON

VERSION_RUN = pa.struct([("start", pa.int32()), ("version", pa.int64())])

SPAN_SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("sequence_id", pa.int64()),  # assigned by the store, from 1, per rollout
        pa.field("trace_id", pa.string()),
        pa.field("span_id", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # UNSET | OK | ERROR
        pa.field("status_message", pa.string()),
        pa.field("role", pa.string()),
        pa.field("attributes", STRING_MAP),
        pa.field("events", pa.string()),  # JSON list
        pa.field("links", pa.string()),  # JSON list
        pa.field("resource", STRING_MAP),
        # a model call
        pa.field("model", pa.string()),
        pa.field("dialect", pa.string()),
        pa.field("parent_call", pa.string()),
        pa.field("parent_tokens", pa.int32()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("response_logprobs", pa.list_(pa.float32())),
        pa.field("weight_versions", pa.list_(VERSION_RUN)),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),  # usage: the whole prompt, shared part included
        pa.field("response_tokens", pa.int32()),
        # a reward
        pa.field("reward", pa.float64()),
        pa.field("reward_dimension", pa.string()),
        pa.field("reward_target", pa.string()),
    ]
)
