"""Objects that a configuration names: `path/file.py:name` or `package.module:name`.

A file is imported under a name made from its path, once per process, with its folder on `sys.path`, so that it may import its
neighbours as it would when run as a script. Called by the trainer, the runners and `agl-ray check`; every failure is an
InputError in one paragraph. Test alone: tests/unit/test_config_imports.py.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from agl_ray.config.paths import close_names, find, looked_in
from agl_ray.types.errors import InputError


def load_object(spec: str, base: Path) -> Any:
    """The object that `spec` names; paths are taken from the current directory, then from `base`.

    Raises InputError: no such file or module, no such name in it (with the closest ones), or the import itself failed
    (its cause in one line).
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise InputError(
            f"{spec!r} names no object: expected 'path/file.py:name' or 'package.module:name'"
        )
    found: Any = load_module(place, base, spec)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")]
            hint = close_names(part, public) or f"; it has {', '.join(sorted(public)[:12])}"
            raise InputError(f"{spec!r}: {place} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def load_module(place: str, base: Path, spec: str | None = None) -> ModuleType:
    """The module at `place`, `path/file.py` or `package.module`. InputError as in `load_object`."""
    if place.endswith(".py") or "/" in place:
        return _from_file(spec or place, place, base)
    return _from_module(spec or place, place)


def _from_file(spec: str, place: str, base: Path) -> ModuleType:
    path = find(place, base)
    if path is None:
        raise InputError(f"{spec!r}: there is no file {place}; {looked_in(place, base)}")
    if path.is_dir():
        raise InputError(f"{spec!r}: {place} is a folder; name a Python file in it")
    key = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    module_name = f"agl_user_{path.stem.replace('-', '_')}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{spec!r}: {place} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise InputError(_import_failed(spec, place, error)) from error
    return module


def _from_module(spec: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise InputError(
                f"{spec!r}: there is no module {error.name!r}; install it, or name a file: 'path/file.py:name'"
            ) from error
        raise InputError(_import_failed(spec, place, error)) from error
    except (Exception, SystemExit) as error:
        raise InputError(_import_failed(spec, place, error)) from error


def _import_failed(spec: str, place: str, error: BaseException) -> str:
    return f"{spec!r}: importing {place} failed: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """`ValueError: text (file.py, line 3)`: the exception and the place that raised it, in one line."""
    words = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    # A syntax error has no frame in the file; its text names the line.
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = ""
    return f"{type(error).__name__}: {words}{where}" if words else f"{type(error).__name__}{where}"
