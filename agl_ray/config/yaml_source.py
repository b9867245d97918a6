"""Reading YAML into plain data, with the line of every key.

YAML 1.2's core types: `2e-4` is a number, `on` and `12:30` and `2026-01-01` are texts. A key given twice in a mapping, an
anchor that refers to itself, more than one document: refused. Called by `agl_ray.config.load`; test alone:
tests/unit/test_config_load.py.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from agl_ray.types.errors import ConfigError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2 (PyYAML's are those of 1.1)."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("int", r"^[-+]?[0-9]+$", "-+0123456789")
_resolve(
    "float",
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
    "-+.0123456789",
)
_resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN")
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))
)
_resolve("merge", r"^<<$", "<")


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    # PyYAML's own constructor reads 010 as octal; in YAML 1.2 it is ten.
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """The data in `text`, and the line (from 1) of each key path. `name` is the file's, for messages."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if node is None:
            return None, lines
        _walk(node, (), lines, name)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_error(error, name)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from error
    finally:
        loader.dispose()


def scalar(text: str) -> Any:
    """The value that `text` has in YAML: 3 -> int, null -> None, [1, 2] -> list, anything else -> text."""
    return read(text, f"the value {text!r}")[0]


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, str(number)), lines, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{name}, line {line}: a key must be a plain name")
        if key.value in seen:
            dotted = ".".join([*path, key.value])
            raise ConfigError(
                f"{name}, line {line}: the key {dotted} is given twice, first in line {seen[key.value]}; "
                "keep one of them"
            )
        seen[key.value] = line
        lines[(*path, key.value)] = line
        _walk(value, (*path, key.value), lines, name)


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    what = " ".join(part for part in (error.context, error.problem) if part)
    return f"{name}{where} is not YAML: {what}; check the indentation and the colons there"
