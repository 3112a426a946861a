"""Weights of experts among a config's targets: which it means, and which cannot be adapted, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..config import LoraConfig
from ..errors import TargetError
from ..module_names import ends_with, matches
from .expert_weight import ExpertWeight, parameters_of, why_not
from .swap import mixin_for

_STARTS = ("default", "gaussian")


def with_expert_weights(names: Mapping[str, nn.Module], chosen: Collection[str]) -> dict[str, nn.Module]:
    """Return the chosen modules of `names`, in the model's order; an experts module stands for its weights."""
    holders = {name.rpartition(".")[0] for name, module in names.items() if isinstance(module, ExpertWeight)}
    chosen = set(chosen)
    meant = {
        name
        for name, module in names.items()
        if (name in chosen and name not in holders)
        or (isinstance(module, ExpertWeight) and name.rpartition(".")[0] in chosen)
        or (isinstance(module, ExpertWeight) and name in chosen)
    }
    return {name: module for name, module in names.items() if name in meant}


def why_no_update(config: LoraConfig) -> str | None:
    """Say why experts can have no update of this config; None if they can."""
    if config.variant != "lora":
        return f"experts can have plain LoRA only, not '{config.variant}' (LoraConfig.variant)"
    if config.init not in _STARTS:
        return f"experts have no start '{config.init}', only {' and '.join(_STARTS)} (LoraConfig.init)"
    return None


def unadapted(names: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, str]:
    """Return what "all-linear" leaves out of experts, and of other modules with 3-D parameters: name -> reason."""
    found: dict[str, str] = {}
    for name, module in names.items():
        why = why_no_update(config) if isinstance(module, ExpertWeight) else None
        if why is None and mixin_for(module) is None:
            why = why_not(module)
        if why is not None:
            found[name] = why
    return found


def check_form(chosen: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Raise TargetError if experts are among the targets, and this config has no update for them."""
    why = why_no_update(config)
    experts = [name for name, module in chosen.items() if isinstance(module, ExpertWeight)]
    if experts and why is not None:
        raise TargetError(f"'{experts[0]}' cannot be adapted: {why}\n  exclude the experts (LoraConfig.exclude)")


def check_reachable(names: Mapping[str, nn.Module], targets: str | list[str]) -> None:
    """Raise TargetError for a target that names parameters of experts that cannot be adapted."""
    for name, module in names.items():
        why = None if mixin_for(module) is not None else why_not(module)
        if why is None:
            continue
        own = parameters_of(module) if isinstance(module.__dict__.get("has_gate"), bool) else tuple(module._parameters)
        for full in (f"{name}.{parameter}" for parameter in own):
            entries = targets if isinstance(targets, list) else []
            hit = next((t for t in entries if ends_with(full, t) and not any(ends_with(n, t) for n in names)), None)
            if hit is not None or (not entries and matches(full, targets)):
                raise TargetError(
                    f"'{full}' cannot be adapted: {why}\n  leave it out of the targets (LoraConfig.targets)"
                )
