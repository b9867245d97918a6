"""Tracing: what the agent's own process records about a rollout."""

from agl_ray.tracing.emit import (
    emit_annotation,
    emit_exception,
    emit_message,
    emit_object,
    emit_reward,
)
from agl_ray.tracing.follow import follow
from agl_ray.tracing.instrument import instrument
from agl_ray.tracing.names import make_link_attributes, make_tag_attributes
from agl_ray.tracing.operation import operation
from agl_ray.tracing.recorder import SpanRecorder, current_recorder, recording
from agl_ray.tracing.sender import SpanSender
from agl_ray.tracing.subprocesses import child_variables
from agl_ray.tracing.threads import carry
from agl_ray.tracing.values import finite_reward

__all__ = [
    "SpanRecorder",
    "SpanSender",
    "carry",
    "child_variables",
    "current_recorder",
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_reward",
    "finite_reward",
    "follow",
    "instrument",
    "make_link_attributes",
    "make_tag_attributes",
    "operation",
    "recording",
]
