"""Low-rank adapters (LoRA, arXiv 2106.09685) by the library peft: put into the model, merged for whoever needs whole weights.

The one file that knows peft (tested with 0.21). The model keeps its class; peft puts its layers in the place of the linear ones and freezes
all weights but theirs. One adapter, or one per trained role (`learner.lora.per_role`), of which the model computes with one at a time
(`act_as`). What leaves the learner from a single adapter is merged and under the base model's names (`merged`), so that an engine cannot
miss it; the learner's own tensors are never merged. Called by learner/step.py, optim.py, weights.py, checkpoint.py and export.py; all but
`add_adapters` do the plain thing for a model without adapters. Test it alone with tests/unit/test_learner_lora.py and
tests/unit/test_learner_lora_roles.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agl_ray.learner import fsdp
from agl_ray.types.errors import InputError

if TYPE_CHECKING:
    from agl_ray.config.lora import LoraConfig

ADAPTER = "default"  # peft's name for the only adapter
OF_ROLE = "role:"  # begins peft's name for a role's adapter: torch takes neither a dot nor a method's name (`eval`) as a module's
PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file


def add_adapters(model: Any, config: LoraConfig, seed: int, roles: Sequence[str] = ()) -> None:
    """Put adapters into `model` in place and freeze everything else; the model still computes what it did.

    roles: one adapter for each of them; none: a single one. All ranks give the same `seed` and get the same adapters, before sharding.
    InputError where a target is no linear layer of the model.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rank_stabilized,
        target_modules=_targets(model, config),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # the second adapter is on purpose; peft warns of it
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                for name in [_name_of(role) for role in sorted(roles)] or [ADAPTER]:
                    peft.inject_adapter_in_model(settings, model, name)
        except ValueError as error:
            raise InputError(
                f"learner.lora.target_modules: peft cannot put adapters on {settings.target_modules}: {error}"
            ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    _refuse_shared(model)
    model.eval()


def _name_of(role: str | None) -> str:
    return ADAPTER if role is None else OF_ROLE + role.replace(".", "~")


def _role_of(name: str) -> str | None:
    return name.removeprefix(OF_ROLE).replace("~", ".") if name.startswith(OF_ROLE) else None


def roles_of(model: Any) -> list[str]:
    """The roles that have an adapter of their own, sorted; [] where all calls have the same weights."""
    names = getattr(model, "peft_config", None) or {}
    return sorted(role for role in map(_role_of, names) if role is not None)


def act_as(model: Any, role: str | None) -> None:
    """From now on the model computes with the adapter of this role, in backward passes too. None: the model has no role's adapter."""
    if role is None:
        return
    for layer in _layers(model):
        # Not by peft's set_adapter: it would take the other adapters' gradients away, of which FSDP has made its plans.
        layer._active_adapter = [_name_of(role)]


def _layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def parts(model: Any) -> dict[str | None, list[torch.nn.Parameter]]:
    """What is trained, by role where each has an adapter of its own; else all under None."""
    found: dict[str | None, list[torch.nn.Parameter]] = {role: [] for role in roles_of(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(adapter_of(name), []).append(parameter)
    return found


def _targets(model: Any, config: LoraConfig) -> list[str]:
    """Last names of the layers that get adapters, sorted. peft itself would pass over a name that fits nothing."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if config.target_modules is None:
        return sorted(linear)
    unknown = sorted(set(config.target_modules) - linear)
    if unknown:
        raise InputError(
            f"learner.lora.target_modules: expected last names of linear layers other than the output head, got {', '.join(unknown)}; "
            f"this model ({type(model).__name__}) has {', '.join(sorted(linear))}"
        )
    return sorted(set(config.target_modules))


def _refuse_shared(model: Any) -> None:
    """InputError where a weight that gets an adapter is another layer's too: merged, the two would differ, and only one could be delivered."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer.", ".*"))
    for shared in names.values():
        if len(shared) > 1 and any(".*" in name for name in shared):
            plain = " and ".join(name.replace(".*", ".") for name in shared)
            raise InputError(
                f"learner.lora.target_modules: expected layers with a weight of their own, but {plain} are one tensor; leave them out"
            )


def has_adapters(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def is_adapter(name: str) -> bool:
    """Whether the tensor of this name in `state_dict` belongs to an adapter."""
    return any(part in ("lora_A", "lora_B") for part in name.split("."))


def adapter_of(name: str) -> str | None:
    """The role whose adapter's tensor has this name in `state_dict`; None where it is no role's."""
    return next((_role_of(part) for part in name.split(".") if part.startswith(OF_ROLE)), None)


def merged(
    model: Any, name: str, tensor: torch.Tensor, role: str | None = None
) -> tuple[str, torch.Tensor]:
    """Name in the base model, and value with the adapter (of `role`) added, of the tensor `name` of `model.state_dict()`, which is no adapter's.

    The parameters stay as they are. With a sharded model a collective: all ranks call it, and get a sharded tensor.
    """
    layer, is_base, kind = name.rpartition(".base_layer.")
    if not is_base:
        return name, tensor
    if kind == "weight":
        with torch.no_grad():
            tensor = tensor + model.get_submodule(layer).get_delta_weight(_name_of(role))
    return f"{layer}.{kind}", tensor


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within it the model computes what the base model does, to the bit: the base as a reference without a second copy."""
    switches = [(layer, name) for layer in _layers(model) for name in model.peft_config]
    for layer, name in switches:
        layer.set_scale(name, 0.0)
    try:
        yield
    finally:
        for layer, name in switches:
            layer.set_scale(name, 1.0)


def identity(model: Any) -> dict[str, Any] | None:
    """What a checkpoint of adapters belongs to: their shape and a checksum of the frozen weights. None without adapters.

    With a sharded model a collective: all ranks call it, and get the same.
    """
    if not has_adapters(model):
        return None
    settings = next(iter(model.peft_config.values()))  # those of all roles are alike
    return {
        **({"per_role": roles_of(model)} if roles_of(model) else {}),
        "rank": settings.r,
        "alpha": settings.lora_alpha,
        "rank_stabilized": settings.use_rslora,
        "target_modules": sorted(settings.target_modules),
        "base": _base_checksum(model),
    }


def _base_checksum(model: Any) -> str:
    """Hex digest of names and values of all frozen tensors; the same for any number of ranks. One tensor is gathered at a time."""
    from blake3 import blake3

    digest = blake3()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_adapter(name):
            whole = fsdp.whole(tensor.detach()).cpu().contiguous()
            plain = name.replace(".base_layer.", ".")
            digest.update(f"{plain} {tuple(whole.shape)} {whole.dtype}\n".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy())
    return str(digest.hexdigest())


def check_same(folder: Path, stored: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    """InputError where the checkpoint `folder`, which belongs to `stored`, does not fit the model, which is `here` (both of `identity`)."""
    if stored == here:
        return
    advice = "set learner.lora as in the run that wrote it"
    if stored is None or here is None:
        wanted, got = (
            "all weights" if side is None else "adapters only" for side in (here, stored)
        )
        raise InputError(
            f"checkpoint {folder}: expected a checkpoint of {wanted}, which is what learner.lora says to train, got one of {got}; {advice}"
        )
    if stored["base"] != here["base"]:
        raise InputError(
            f"checkpoint {folder}: expected adapters of the base model with checksum {here['base'][:16]}, got those of "
            f"{stored['base'][:16]}; give the base model that they were trained on"
        )
    key = next(key for key in {**here, **stored} if stored.get(key) != here.get(key))
    raise InputError(
        f"checkpoint {folder}: expected adapters with learner.lora.{key} {here.get(key)}, got {stored.get(key)}; {advice}"
    )


def adapter_states(model: Any, *, keep: bool = True) -> dict[str | None, dict[str, torch.Tensor]]:
    """The tensors of each role's adapter (of the only one under None) on the CPU, under the names of peft's files.

    A collective: all ranks call it, those with `keep` False get {}. {} for a model without adapters."""
    states: dict[str | None, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_adapter(name):
            whole = fsdp.whole(tensor.detach())
            if keep:
                role = adapter_of(name)
                plain = PEFT_PREFIX + name.replace(f".{_name_of(role)}.", ".")
                states.setdefault(role, {})[plain] = whole.to("cpu", copy=True).contiguous()
    return states


def write_adapter(
    model: Any, state: dict[str, torch.Tensor], folder: Path, role: str | None = None
) -> None:
    """Write `state` (of `adapter_states`) as a folder that peft and vLLM read as an adapter of the base model."""
    from safetensors.torch import save_file

    model.peft_config[_name_of(role)].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
