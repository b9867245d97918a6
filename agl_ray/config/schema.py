"""The keys of a configuration, looked up by path: field, documentation, known names.

Called by the loader for its messages. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agl_ray.config.models import RunConfig


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation (`Section`, `Section | None`, one of several forms), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (section_of(kind) for kind in get_args(annotation))
    return next((kind for kind in inner if kind is not None), None)


def _walk(
    path: tuple[str, ...], root: type[BaseModel]
) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field at a path and the section that its value is. A mapping's keys are names that the person chose: any will do."""
    model: type[BaseModel] | None = root
    field: FieldInfo | None = None
    named: type[BaseModel] | None = None
    for key in path:
        if named is not None:
            model, named = named, None
            continue
        if model is None or key not in model.model_fields:
            return None, None
        field = model.model_fields[key]
        model = section_of(field.annotation)
        if get_origin(field.annotation) is dict:
            if model is None:  # of plain values: all that is under it is the person's
                return field, None
            model, named = None, model
    return field, model


def field_at(path: tuple[str, ...], root: type[BaseModel] = RunConfig) -> FieldInfo | None:
    """The field at a path of keys such as ("train", "steps"), or None where there is no such key."""
    return _walk(path, root)[0]


def names_in(path: tuple[str, ...], root: type[BaseModel] = RunConfig) -> list[str]:
    """The keys that the section at `path` knows; empty where `path` is no section."""
    model = _walk(path, root)[1] if path else root
    return list(model.model_fields) if model else []


def all_paths(root: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included; NAME stands for the names of a mapping."""
    for name, field in root.model_fields.items():
        yield prefix + name
        model = section_of(field.annotation)
        if model is not None:
            inner = f"{name}.NAME" if get_origin(field.annotation) is dict else name
            yield from all_paths(model, f"{prefix}{inner}.")


def allows_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def first_sentence(field: FieldInfo) -> str:
    """What the key does, in its documentation's first sentence."""
    words = " ".join((field.description or "").split())
    return words.split(". ")[0].rstrip(".")
