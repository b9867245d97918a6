"""The command line, `agl-ray`: one module per verb, none of which loads torch, vLLM or Ray before it needs it.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong.
"""

from __future__ import annotations

from agl_ray.cli.app import main

__all__ = ["main"]
