"""Typed, strict configuration: YAML in, resolved JSON out."""

from agl_ray.config.models import RunConfig

__all__ = ["RunConfig"]
