"""The section `roles` of the configuration: who answers the calls that an agent makes under a name.

`roles: {planner: train, critic: frozen, judge: {kind: endpoint, base_url: ..., model: ...}}`. A call without a role goes to the run's own
engine and is trained. Test alone: tests/unit/test_config_roles.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from agl_ray.config.keys import endpoint_key
from agl_ray.config.model_folder import check_model_folder
from agl_ray.config.paths import find
from agl_ray.config.section import Positive, PositiveFloat, Section

RoleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class RoleConfig(Section):
    kind: Literal["train", "frozen", "endpoint"]
    """train: the run's own engine, and its tokens are trained; frozen: an engine of its own whose weights never change; endpoint: a model
    outside, over HTTP. Calls of all kinds are recorded. `planner: train` is short for `planner: {kind: train}`."""
    model: str | None = None
    """frozen: folder of the model, such as an `export` of an earlier run; None = the run's base model. endpoint: name of its model."""
    replicas: Positive = 1
    """frozen: vLLM engines of this role."""
    base_url: str | None = None
    """endpoint: where its API is; `https://api.openai.com/v1` for api openai, `https://api.anthropic.com` for api anthropic."""
    api: Literal["openai", "anthropic"] = "openai"
    """endpoint: what it speaks: openai (POST BASE_URL/chat/completions) or anthropic (POST BASE_URL/v1/messages)."""
    api_key_env: str | None = None
    """endpoint: environment variable of the driver that holds its key; None = it asks for none."""
    requests_per_minute: PositiveFloat | None = None
    """endpoint: calls of one gateway process are spread to so many; None = no limit."""
    concurrency: Positive = 16
    """endpoint: most calls of one gateway process at once; others wait their turn, within `gateway.call_timeout_seconds`."""
    max_tokens: Positive = 4096
    """endpoint: most response tokens of a call; an agent may ask for fewer."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """endpoint, api openai: what it calls that limit (OpenAI's own newer models: max_completion_tokens)."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits_its_kind(self) -> RoleConfig:
        for name, field in type(self).model_fields.items():
            kinds = _ACTS_WITH.get(name)
            if kinds and self.kind not in kinds and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} acts for a role of kind {' or '.join(kinds)} only, and this one's is {self.kind}; leave it out"
                )
        if self.kind != "endpoint":
            return self
        for name in ("base_url", "model"):
            if getattr(self, name) is None:
                raise ValueError(f"a role of kind endpoint needs {name}")
        if urlsplit(self.base_url or "").scheme not in ("http", "https"):
            raise ValueError(f"base_url: expected http://... or https://..., got {self.base_url!r}")
        if self.api == "anthropic" and self.max_tokens_field != "max_tokens":
            raise ValueError("max_tokens_field acts with api openai only; leave it out")
        return self


_ENDPOINT = ("endpoint",)
_ACTS_WITH: dict[str, tuple[str, ...]] = {
    "model": ("frozen", "endpoint"),
    "replicas": ("frozen",),
    **dict.fromkeys(
        (
            *("base_url", "api", "api_key_env", "requests_per_minute"),
            *("concurrency", "max_tokens", "max_tokens_field"),
        ),
        _ENDPOINT,
    ),
}
"""Keys that act for some kinds of role; a value of their own is refused elsewhere."""


def role_models(roles: dict[str, RoleConfig]) -> dict[str, str | None]:
    """Role -> the model name that its calls ask for; None: that of the run's own engine."""
    return {name: role.model if role.kind == "endpoint" else None for name, role in roles.items()}


def located_roles(roles: dict[str, RoleConfig], base: Path) -> dict[str, RoleConfig]:
    """The roles with the folders of frozen ones as they are found from anywhere; InputError names the role whose folder is no model folder.
    base: folder of the configuration file."""
    located = {}
    for name, role in roles.items():
        if role.kind == "frozen" and role.model is not None:
            folder = find(role.model, base) or Path(role.model)
            check_model_folder(folder, f"roles.{name}.model")
            role = role.model_copy(update={"model": str(folder)})
        located[name] = role
    return located


def endpoint_keys(roles: dict[str, RoleConfig]) -> dict[str, str]:
    """Role -> its key, out of this process's environment; ConfigError names the role and the variable that is not set."""
    keys = {}
    for name, role in roles.items():
        key = endpoint_key(f"roles.{name}.api_key_env", role.api_key_env, role.base_url)
        if key is not None:
            keys[name] = key
    return keys
