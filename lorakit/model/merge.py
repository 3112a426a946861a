"""Merge the active adapters into the base's weights, and unmerge them bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch import nn

from ..bases.pipeline import as_module
from ..errors import StateError, listing
from ..layers import fused_qkv, saved
from ..layers.layer import LoraLayer
from ..layers.merge import TIED, check_finite, merge_module, unmerge_module
from ..layers.walk import base_modules
from .state import Untied, check_not_routed, layers_of, names_of, saved_parameters, state_of


def merge(model: Any, *, untie: bool = False) -> None:
    """Add the active adapters' ΔW to the base's weights. `unmerge` restores every bit.

    That takes a quarter to one byte of memory per merged weight. `untie`: give an adapted module that shares its weight
    with another (a tied embedding) a copy of it first, and say so in the model's config; `unmerge` ties them again.
    Raises StateError if an adapter is merged already or none is active, for weights that cannot be merged (tied to
    another module's, quantized, offloaded), and for factors that are not finite or make a weight infinite. After an
    error nothing is merged.
    """
    model = as_module(model)
    state = state_of(model)
    check_not_routed(state, "merge")
    if state.merged is not None:
        raise StateError(f"{names_of(state.merged)} is merged already\n  call lorakit.unmerge(model) first")
    if not state.active:
        raise StateError(
            "no adapter is active, so there is nothing to merge\n  call lorakit.activate(model, name) first"
        )
    fused_qkv.check_called(model, "merge")
    layers = {m: layer for m, layer in layers_of(model) if layer.lora_in_use()}
    shared = shared_weights(model, layers)
    if shared and not untie:
        _raise_tied(shared)
    done: list[LoraLayer] = []
    untied = _untie(model, layers, shared)
    try:
        for name in state.active:
            for full, parameter in saved_parameters(model, state, name):
                check_finite(parameter, f"'{full}' of adapter '{name}'")
        held = {id(_weight(layer)) for layer in layers.values() if not _is_tied(layer)}
        for m, layer in layers.items():
            if _is_tied(layer) and id(_weight(layer)) in held:
                layer.lora_merged = TIED  # by the module whose weight it shares
            else:
                merge_module(layer, m)
            done.append(layer)
    except Exception:
        for layer in done:
            unmerge_module(layer, "a module")
        _tie(model, untied)
        raise
    state.merged, state.untied = dict(state.active), untied


def unmerge(model: Any) -> None:
    """Restore the base's weights as they were before `merge`, bit for bit. Raises StateError if nothing is merged."""
    model = as_module(model)
    state = state_of(model)
    if state.merged is None:
        raise StateError("nothing is merged into this model")
    fused_qkv.check_called(model, "unmerge")
    for m, layer in layers_of(model):
        if layer.lora_merged is not None:
            unmerge_module(layer, m)
    state.merged = None
    if state.untied is not None:
        _tie(model, state.untied)
        state.untied = None


def _weight(layer: LoraLayer) -> nn.Parameter | None:
    """Return the layer's own weight (of torch's attention, that of q, k and v); None if it has none of that name, as
    some quantized linears.
    """
    own = layer._parameters
    return own.get("weight") if own.get("weight") is not None else own.get("in_proj_weight")


def _is_tied(layer: LoraLayer) -> bool:
    """Whether all its updates in use are those of another module, whose weight it shares."""
    return all(update.tied for update, _ in layer.lora_in_use())


def _together(layer: LoraLayer, other: LoraLayer | None) -> bool:
    """Whether two modules that share a weight also share all updates in use, so that one merge is for both."""
    return other is not None and layer.lora_active == other.lora_active and (_is_tied(layer) != _is_tied(other))


def shared_weights(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, list[str]]:
    """Return the adapted layers that share their weight with other modules, by name: merging would change those too."""
    users: dict[int, list[str]] = {}
    for name, module in base_modules(model):
        for own, parameter in module._parameters.items():
            is_weight = parameter is getattr(module, "weight", None)  # an adapted attention's has another name
            users.setdefault(id(parameter), []).append(name if is_weight else f"{name}.{own}" if name else own)
    found = {
        m: [n for n in users.get(id(weight), []) if n != m and not _together(layer, layers.get(n))]
        for m, layer in layers.items()
        if (weight := _weight(layer)) is not None
    }
    return {m: others for m, others in found.items() if others}


def _raise_tied(shared: Mapping[str, list[str]]) -> NoReturn:
    module, others = next(iter(shared.items()))
    raise StateError(
        f"'{module}' shares its weight with {listing(others)} (tied weights), so merging would change both\n"
        "  merge(model, untie=True) gives it a weight of its own; or keep the adapter unmerged"
    )


def _untie(model: nn.Module, layers: Mapping[str, LoraLayer], shared: Iterable[str]) -> Untied | None:
    """Give these layers copies of their weights, and say in the model's config that its embeddings are not tied."""
    untied = Untied({}, [])
    for m in shared:
        weight = _weight(layers[m])
        named = layers[m]._parameters.get("weight") is weight
        if saved.saved_of(layers[m]) is not None or type(weight) is not nn.Parameter or not named:
            _tie(model, untied)
            raise StateError(
                f"'{m}' shares its weight with another module and cannot be given one of its own, since an adapter "
                "replaces it or it is quantized\n"
                "  keep the adapter unmerged"
            )
        untied.weights[m] = weight
        layers[m]._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if not untied.weights:
        return None
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for each in (config, text):
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
            untied.configs.append(each)
    return untied


def _tie(model: nn.Module, untied: Untied | None) -> None:
    """Undo `_untie`."""
    if untied is not None:
        for m, weight in untied.weights.items():
            model.get_submodule(m)._parameters["weight"] = weight
        for config in untied.configs:
            config.tie_word_embeddings = True
