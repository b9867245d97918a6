"""Spans as Arrow: schema, builder, wire format."""

from agl_ray.spans.build import JsonText, new_span_id, span_batch
from agl_ray.spans.ipc import batch_from_ipc, batch_to_ipc, table_from_ipc
from agl_ray.spans.schema import KIND_CALL, KIND_REWARD, KIND_SPAN, ROLE_KIND, SPAN_SCHEMA

__all__ = [
    "KIND_CALL",
    "KIND_REWARD",
    "KIND_SPAN",
    "ROLE_KIND",
    "SPAN_SCHEMA",
    "JsonText",
    "batch_from_ipc",
    "batch_to_ipc",
    "new_span_id",
    "span_batch",
    "table_from_ipc",
]
