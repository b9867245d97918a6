"""Tracing: what the agent's own process records about a rollout."""

from agl_ray.tracing.emit import emit_reward, finite_reward
from agl_ray.tracing.recorder import SpanRecorder, current_recorder, recording

__all__ = ["SpanRecorder", "current_recorder", "emit_reward", "finite_reward", "recording"]
