"""Validation errors in words: which key, where it was said, what was expected, what was got, what was perhaps meant.

Called by `agl_ray.config.load`. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from agl_ray.config.agent import FORMS
from agl_ray.config.paths import close_names
from agl_ray.config.schema import all_paths, allows_null, field_at, first_sentence, names_in

KeyPath = tuple[str, ...]


@dataclass
class Sources:
    """Where each key was said: a line of the file, or an override."""

    name: str
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def override(self, path: KeyPath, text: str) -> None:
        self.overrides[path] = text
        # What the file said there, or inside it, no longer counts.
        self.lines = {key: n for key, n in self.lines.items() if key[: len(path)] != path}

    def at(self, path: KeyPath) -> str:
        """`override 'a=b'` or `FILE, line N` of the key, or of the closest section around it that was said."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return f"override {self.overrides[path[:end]]!r}"
            if path[:end] in self.lines:
                return f"{self.name}, line {self.lines[path[:end]]}"
        return self.name

    def overrides_in(self, path: KeyPath) -> str:
        """` with the overrides 'a=b', 'c=d'` said of keys inside the section `path`, or an empty text."""
        inside = [text for key, text in self.overrides.items() if key[: len(path)] == path]
        if not inside:
            return ""
        return f" with {', '.join(repr(text) for text in inside)}"


def explain(error: ValidationError, data: dict[str, Any], sources: Sources) -> str:
    """One paragraph for all that pydantic found."""
    texts = list(dict.fromkeys(_one(item, data, sources) for item in error.errors()))
    if len(texts) == 1:
        return texts[0]
    return f"{len(texts)} problems: " + " ".join(f"({n}) {t};" for n, t in enumerate(texts, 1))[:-1]


def unknown_key(path: KeyPath, where: str) -> str:
    """`where`: unknown key ...; with the closest known names, of its section first, then of the whole."""
    dotted = ".".join(path)
    known = list(all_paths())
    parent = path[:-1]
    if parent and field_at(parent) is None:
        return unknown_key(parent, where)
    here = names_in(parent)
    hint = close_names(path[-1], here)
    if not hint:
        same_name = [each for each in known if each.split(".")[-1] == path[-1]]
        hint = (
            f"; did you mean {' or '.join(same_name)}?" if same_name else close_names(dotted, known)
        )
    inside = f" in {'.'.join(parent)}" if parent else ""
    if parent and not here:
        return f"{where}: unknown key {dotted}: {'.'.join(parent)} is a value, not a section"
    if not hint:
        hint = f"; known keys{inside}: {', '.join(here)}"
    return f"{where}: unknown key {dotted}{hint}"


def _one(item: Any, data: dict[str, Any], sources: Sources) -> str:
    path = tuple(str(part) for part in item["loc"] if part not in FORMS)
    where = sources.at(path)
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        return unknown_key(path, where)
    dotted = ".".join(path)
    known = field_at(path)
    if kind == "missing" and path[-1].isdigit():
        return f"{where}: {'.'.join(path[:-1])}: expected more than {path[-1]} items"
    if kind == "missing":
        about = f": {first_sentence(known)}" if known and known.description else ""
        return f"{where}: the key {dotted} is missing{about}"
    if kind == "value_error":
        # Raised by a section's own check: a whole sentence that names its keys.
        return f"{where}{sources.overrides_in(path)}: {context['error']}"
    expected = _expected(kind, context, item["msg"])
    if known is not None and allows_null(known):
        expected += " or null"
    return f"{where}: {dotted}: expected {expected}, got {_got(path, data)}"


def _got(path: KeyPath, data: Any) -> str:
    """The value at `path` in the raw data, short."""
    for part in path:
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict | list):
            return "nothing"
        else:
            break  # a word that stands for a section (`planner: train`)
    if data is None:
        return "null"
    if isinstance(data, bool):
        return "true" if data else "false"
    words = repr(data)
    return words if len(words) <= 60 else words[:57] + "..."


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys with values",
    "model_type": "a section (keys with values)",
    "model_attributes_type": "a section (keys with values)",
    "path_type": "a path",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return f"{words} {context[key]:g}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"{'at least' if kind == 'too_short' else 'at most'} {bound} items"
    return _TYPES.get(kind, message[:1].lower() + message[1:])
