"""Merge the active adapters into the base's weights, and unmerge them bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import StateError, listing
from ..layers.layer import LoraLayer
from ..layers.merge import merge_module, unmerge_module
from ..layers.walk import base_modules
from ..ops.exact import Undo
from .state import check_not_routed, layers_of, names_of, state_of


def merge(model: nn.Module) -> None:
    """Add the active adapters' ΔW to the base's weights. `unmerge` restores every bit.

    That takes a quarter to one byte of memory per merged weight. Raises StateError if an adapter is merged already or
    none is active, and for weights that cannot be merged: tied to another module's, quantized, or offloaded. After an
    error nothing is merged.
    """
    state = state_of(model)
    check_not_routed(state, "merge")
    if state.merged is not None:
        raise StateError(f"{names_of(state.merged)} is merged already\n  call lorakit.unmerge(model) first")
    if not state.active:
        raise StateError(
            "no adapter is active, so there is nothing to merge\n  call lorakit.activate(model, name) first"
        )
    layers = {m: layer for m, layer in layers_of(model) if layer.lora_in_use()}
    check_tied(model, layers)
    done: list[LoraLayer] = []
    try:
        for m, layer in layers.items():
            if _is_tied(layer):
                layer.lora_merged = Undo(0)  # by the module whose weight it shares
            else:
                merge_module(layer, m)
            done.append(layer)
    except Exception:
        for layer in done:
            unmerge_module(layer, "a module")
        raise
    state.merged = dict(state.active)


def unmerge(model: nn.Module) -> None:
    """Restore the base's weights as they were before `merge`, bit for bit. Raises StateError if nothing is merged."""
    state = state_of(model)
    if state.merged is None:
        raise StateError("nothing is merged into this model")
    for m, layer in layers_of(model):
        if layer.lora_merged is not None:
            unmerge_module(layer, m)
    state.merged = None


def _is_tied(layer: LoraLayer) -> bool:
    """Whether all its updates in use are those of another module, whose weight it shares."""
    return all(update.tied for update, _ in layer.lora_in_use())


def _together(layer: LoraLayer, other: LoraLayer | None) -> bool:
    """Whether two modules that share a weight also share all updates in use, so that one merge is for both."""
    return other is not None and layer.lora_active == other.lora_active and (_is_tied(layer) != _is_tied(other))


def check_tied(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Raise StateError if an adapted layer shares its weight with another module: merging would change both."""
    users: dict[int, list[str]] = {}
    for name, module in base_modules(model):
        for own, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(name if own == "weight" else f"{name}.{own}" if name else own)
    for m, layer in layers.items():
        others = [n for n in users.get(id(layer.weight), []) if n != m and not _together(layer, layers.get(n))]
        if others:
            raise StateError(
                f"'{m}' shares its weight with {listing(others)} (tied weights), so merging would change both\n"
                "  keep the adapter unmerged, or give the module a weight of its own first:\n"
                "  module.weight = torch.nn.Parameter(module.weight.detach().clone()), and config.tie_word_embeddings "
                "= False"
            )
