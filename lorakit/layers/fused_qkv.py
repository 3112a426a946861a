"""Attention whose projections diffusers has fused: `fuse_qkv_projections` copies the weights of to_q, to_k and to_v
into a new linear to_qkv, and does not call the three any more. An update of theirs would have no effect.

Attaching to them is an error. Fusing them later is one at the next forward, from a hook on each attention that has an
adapted projection; `detach` takes the hook away. Fusing after a merge is right: the copied weights have ΔW.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..errors import StateError
from .layer import LoraLayer
from .walk import base_modules

# The fused linear, and what it stands for.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
FIX = "call unfuse_qkv_projections() on the model first; after lorakit.merge(model) it may be fused"


def bypassed(attention: nn.Module) -> list[str]:
    """Return the children of an attention that are not called, since their weights are fused into another one's."""
    if not attention.__dict__.get("fused_projections"):
        return []
    # Unfused, diffusers' older `Attention` keeps its flag and to_qkv, and has a processor that calls to_v again.
    processor = getattr(attention, "processor", None)
    code = getattr(inspect.unwrap(type(processor).__call__), "__code__", None) if callable(processor) else None
    if code is not None and "to_v" in code.co_names:
        return []
    present = attention._modules
    return [child for fused, children in _FUSED.items() if fused in present for child in children if child in present]


def fused_away(names: dict[str, nn.Module]) -> dict[str, str]:
    """Return the modules of a model that are not called since they are fused, with the reason."""
    return {
        f"{name}.{child}": "its weight is fused into another module's (fuse_qkv_projections), which is called instead"
        for name, module in names.items()
        for child in bypassed(module)
    }


def copies(model: nn.Module) -> set[str]:
    """Return the fused linears of a model: copies of weights that it has anyway, also after it was unfused."""
    return {
        f"{name}.{fused}"
        for name, module in base_modules(model)
        for fused, children in _FUSED.items()
        if fused in module._modules and module._modules.keys() >= set(children)
    }


def watch(model: nn.Module) -> None:
    """Make every attention with an adapted projection check, when it is called, that it has not been fused since."""
    for _, module in base_modules(model):
        watched = _check in module._forward_pre_hooks.values()
        if not watched and hasattr(type(module), "fuse_projections") and _has_adapted(module):
            module.register_forward_pre_hook(_check)


def unwatch(model: nn.Module) -> None:
    """Take the check away from every attention without adapted projections."""
    for _, module in base_modules(model):
        if hasattr(type(module), "fuse_projections") and not _has_adapted(module):
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _check]:
                del module._forward_pre_hooks[key]


def _has_adapted(module: nn.Module) -> bool:
    return any(isinstance(child, LoraLayer) for child in module._modules.values())


def check_called(model: nn.Module, function: str) -> None:
    """Raise StateError if an adapted module of the model is fused into another one. `function`: for the message."""
    for name, module in base_modules(model):
        for child in bypassed(module):
            if isinstance(module._modules[child], LoraLayer):
                raise StateError(
                    f"{function}(model): the weight of '{name}.{child}' is fused into another module's "
                    f"(fuse_qkv_projections), which would stay as it is\n  {FIX}"
                )


def _check(attention: nn.Module, _: Any) -> None:
    for child in bypassed(attention):
        layer = attention._modules[child]
        if isinstance(layer, LoraLayer) and (layer.lora_route is not None or layer.lora_in_use()):
            raise StateError(
                f"the projections of a {type(attention).__name__} were fused after an adapter was attached to its "
                f"'{child}', which is not called any more: the adapter has no effect there\n  {FIX}"
            )
