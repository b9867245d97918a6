"""agl_ray: train any LLM agent on a Ray cluster.

The public names, imported on first use: `import agl_ray` loads no torch, vLLM or Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "LLM": "agl_ray.types",
    "AglError": "agl_ray.types",
    "Attempt": "agl_ray.types",
    "AttemptedRollout": "agl_ray.types",
    "EndReason": "agl_ray.types",
    "InputError": "agl_ray.types",
    "NamedResources": "agl_ray.types",
    "PromptTemplate": "agl_ray.types",
    "Rollout": "agl_ray.types",
    "RolloutConfig": "agl_ray.types",
    "CommandAgent": "agl_ray.agents",
    "EnvironmentFailure": "agl_ray.agents",
    "Hook": "agl_ray.agents",
    "LitAgent": "agl_ray.agents",
    "RolloutContext": "agl_ray.agents",
    "llm_rollout": "agl_ray.agents",
    "prompt_rollout": "agl_ray.agents",
    "rollout": "agl_ray.agents",
    "advantage": "agl_ray.algorithms",
    "policy_loss": "agl_ray.algorithms",
    "Verdict": "agl_ray.judge",
    "emit_annotation": "agl_ray.tracing",
    "emit_exception": "agl_ray.tracing",
    "emit_message": "agl_ray.tracing",
    "emit_object": "agl_ray.tracing",
    "emit_reward": "agl_ray.tracing",
    "operation": "agl_ray.tracing",
    "LightningStore": "agl_ray.store",
    "RunConfig": "agl_ray.config",
    "Trainer": "agl_ray.trainer",
}

__all__ = sorted([*_NAMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'agl_ray' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
