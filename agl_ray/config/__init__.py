"""Typed, strict configuration: YAML in, resolved JSON out; the objects and rows that it names."""

from __future__ import annotations

from agl_ray.config.imports import load_object
from agl_ray.config.load import load_config, resolved_json
from agl_ray.config.models import RunConfig
from agl_ray.config.rows import load_rows

__all__ = ["RunConfig", "load_config", "load_object", "load_rows", "resolved_json"]
