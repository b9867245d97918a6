"""The keys of a configuration, looked up by path: field, documentation, known names.

Called by the loader for its messages. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agl_ray.config.models import RunConfig


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation (`Section`, `Section | None`, one of several forms), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (section_of(kind) for kind in get_args(annotation))
    return next((kind for kind in inner if kind is not None), None)


def field_at(path: tuple[str, ...], root: type[BaseModel] = RunConfig) -> FieldInfo | None:
    """The field at a path of keys such as ("train", "steps"), or None where there is no such key."""
    model: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for key in path:
        if model is None or key not in model.model_fields:
            return None
        field = model.model_fields[key]
        model = section_of(field.annotation)
    return field


def names_in(path: tuple[str, ...], root: type[BaseModel] = RunConfig) -> list[str]:
    """The keys that the section at `path` knows; empty where `path` is no section."""
    field = field_at(path, root) if path else None
    model = root if not path else section_of(field.annotation) if field else None
    return list(model.model_fields) if model else []


def all_paths(root: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included."""
    for name, field in root.model_fields.items():
        yield prefix + name
        model = section_of(field.annotation)
        if model is not None:
            yield from all_paths(model, f"{prefix}{name}.")


def allows_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def first_sentence(field: FieldInfo) -> str:
    """What the key does, in its documentation's first sentence."""
    words = " ".join((field.description or "").split())
    return words.split(". ")[0].rstrip(".")
