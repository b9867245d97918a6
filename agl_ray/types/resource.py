"""Resources: what the algorithm hands to agents (an endpoint, a prompt template), versioned as snapshots."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from agl_ray.types.errors import InputError
from agl_ray.types.rollout import Record, Rollout


class LLM(Record, frozen=True, tag_field="resource_type", tag="llm"):
    """A model endpoint. `endpoint` is the root of our gateway (no `/v1`), or any OpenAI-compatible base URL when
    `gateway` is False. `sampling_parameters` are defaults for requests that leave them out. `roles`: the names under which our gateway
    has further models, with the model name of those that are outside."""

    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = {}
    gateway: bool = True
    roles: dict[str, str | None] = {}

    def get_base_url(self, rollout_id: str, attempt_id: str, role: str | None = None) -> str:
        """The base URL for an OpenAI client inside this attempt: every call made through it is recorded there."""
        if not self.gateway:
            return self.endpoint
        role_part = f"/role/{role}" if role else ""
        return (
            f"{self.endpoint.rstrip('/')}/rollout/{rollout_id}/attempt/{attempt_id}{role_part}/v1"
        )


class PromptTemplate(Record, frozen=True, tag_field="resource_type", tag="prompt_template"):
    """A prompt with `{placeholders}`; engine `f-string` is str.format."""

    template: str
    engine: str = "f-string"

    def format(self, **values: Any) -> str:
        if self.engine != "f-string":
            raise ValueError(f"PromptTemplate.engine: expected 'f-string', got {self.engine!r}")
        return self.template.format(**values)


Resource: TypeAlias = LLM | PromptTemplate
NamedResources: TypeAlias = dict[str, Resource]


def named_llm(rollout: Rollout, resources: NamedResources) -> LLM | None:
    """The LLM resource that the rollout's metadata names (`resource`); None where they name none. InputError where it is not there."""
    named = rollout.metadata.get("resource")
    if named is None:
        return None
    llms = {name: one for name, one in resources.items() if isinstance(one, LLM)}
    if not isinstance(named, str) or named not in llms:
        raise InputError(
            f"rollout {rollout.rollout_id}: expected metadata['resource'] to name one of its LLM resources ({', '.join(sorted(llms)) or 'there are none'}), "
            f"got {named!r}; give the name of one of them"
        )
    return llms[named]


class ResourcesUpdate(Record, frozen=True):
    """A snapshot of named resources. `version` counts updates of the same id, from 1."""

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: dict[str, LLM | PromptTemplate]


def resources_from_json(body: bytes) -> ResourcesUpdate:
    return msgspec.json.decode(body, type=ResourcesUpdate)
