"""Where a path in a configuration points: from the current directory, else from the configuration file's folder.

Called by the loader, the data and agent imports, and `agl-ray check`. Test alone: tests/unit/test_config_imports.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def find(name: str, base: Path) -> Path | None:
    """The existing file or folder `name`: absolute, or under the current directory, or under `base`; None = nowhere."""
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [Path.cwd() / path, base / path]
    return next((each.resolve() for each in candidates if each.exists()), None)


def looked_in(name: str, base: Path) -> str:
    """The places where `find` looked, in words, with the closest names that are there."""
    path = Path(name).expanduser()
    folders = [Path.cwd() / path.parent, base / path.parent]
    seen = [folder.resolve() for folder in ([path.parent] if path.is_absolute() else folders)]
    places = list(dict.fromkeys(seen))
    names = [each.name for folder in places if folder.is_dir() for each in folder.iterdir()]
    missing = [str(folder) for folder in places if not folder.is_dir()]
    words = "looked in " + " and ".join(str(folder) for folder in places)
    if len(missing) == len(places):
        return words + " (no such folder)"
    return words + close_names(path.name, names)


def close_names(wanted: str, names: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for the names that resemble `wanted`, else an empty text."""
    close = difflib.get_close_matches(wanted, list(dict.fromkeys(names)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
