"""The endpoints that an attempt has: the run's own and one per role, each under the attempt's own URL.

Called by execute.py, for `ctx.llm(role)`. Test alone: tests/unit/test_agents_roles.py.
"""

from __future__ import annotations

from agl_ray.types import LLM, AttemptedRollout, NamedResources, named_llm, replace

NO_KEY = "agl-ray"  # OpenAI clients refuse to start without one


def endpoints(attempt: AttemptedRollout, resources: NamedResources) -> dict[str, LLM]:
    """Role -> LLM; under the empty name the run's own. The resource is the one that the rollout's metadata names (`resource`), as at
    the gateway, or the first LLM; where there is none, there are no endpoints. InputError where it names none of them."""
    first = next((one for one in resources.values() if isinstance(one, LLM)), None)
    main = named_llm(attempt.rollout, resources) or first
    if main is None:
        return {}
    found = {"": _at(main, attempt, None)}
    for role, model in main.roles.items():
        llm = _at(main, attempt, role)
        # A model outside has its own name, and none of the run's sampling settings.
        found[role] = llm if model is None else replace(llm, model=model, sampling_parameters={})
    return found


def _at(llm: LLM, attempt: AttemptedRollout, role: str | None) -> LLM:
    url = llm.get_base_url(attempt.rollout_id, attempt.attempt_id, role)
    return replace(llm, endpoint=url, api_key=llm.api_key or NO_KEY, gateway=False, roles={})
