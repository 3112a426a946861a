"""Remove adapters from a model."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from ..bases.pipeline import as_module
from ..errors import StateError
from ..layers import fastpath, fused_qkv, saved
from ..layers.bases import base_of, quantized
from ..layers.fused import attention, fused
from ..layers.layer import COUNT, child_name, remove_update
from ..layers.swap import release
from . import save_pretrained
from .activate import set_active
from .embeddings import put_in_place
from .merge import unmerge
from .state import STATE, State, attached_of, check_not_routed, layer_at, mark_in_use, names_of, state_of

Model = TypeVar("Model")


def detach(model: Model, name: str | None = None, merged: Literal["keep", "undo"] | None = None) -> Model:
    """Remove one adapter, or all of them (None). Returns the model or pipeline that it was given.

    Without adapters the model has its own classes, parameter names, `requires_grad` flags and weights again, bit for
    bit. Where a merged adapter is removed, `merged` says what to do: "keep" leaves ΔW (and saved weights) in the base,
    giving a plain merged model; "undo" restores the base first. Raises StateError for an unknown name, inside `route`,
    and when `merged` is needed but not given.
    """
    _detach(as_module(model), name, merged)
    return model


def _detach(model: nn.Module, name: str | None, merged: Literal["keep", "undo"] | None) -> None:
    state = state_of(model)
    check_not_routed(state, "detach")
    if merged not in (None, "keep", "undo"):
        raise StateError(f"detach(model, merged={merged!r}): expected 'keep' or 'undo'")
    removed = list(state.adapters) if name is None else [name]
    for n in removed:
        attached_of(state, n)
    if state.merged is not None:
        if merged is None and not state.merged.keys().isdisjoint(removed):
            raise StateError(
                f"{names_of(state.merged)} is merged\n"
                "  call detach(model, merged='keep') for a plain merged model, or merged='undo' for the base"
            )
        if merged == "undo":
            unmerge(model)
        elif merged == "keep" and name is not None:
            raise StateError("merged='keep' removes all adapters, so it takes no `name`\n  omit `name`")
    keep = state.active if merged == "keep" and state.merged is not None else {}
    if name is None:
        state.routes = None
    for n in removed:
        _remove(model, state, n, keep_saved=n in keep)
    if not keep:  # the tokens of a merged adapter stay
        put_in_place(model, state)
    mark_in_use(model, state)
    if not state.adapters:
        del model.__dict__[STATE]
        for full, parameter in model.named_parameters():
            parameter.requires_grad_(full in state.required_grad)
    else:
        set_active(model, state, {n: w for n, w in state.active.items() if n in state.adapters})
    fastpath.reopen(model)
    fused_qkv.unwatch(model)
    if state.adapters:
        fused.adopt(model)  # the removed adapter may have kept a block from being fused
    else:
        save_pretrained.release(model)
        fused.release(model)
        attention.leave(model)
        for module in quantized(model).values():
            base_of(module).restore(module)


def _remove(model: nn.Module, state: State, name: str, keep_saved: bool) -> None:
    attached = state.adapters.pop(name)
    child, ranks = child_name(name), {}
    for m in attached.modules:
        module = layer_at(model, m)
        ranks[module] = remove_update(module, child).width
    still_adapted = {module for module in ranks if module.__dict__[COUNT]}
    if state.routes is not None:
        state.routes.detached(child, ranks, still_adapted)
    for module in ranks:
        if module not in still_adapted:
            release(module)
    if attached.saved:
        if keep_saved:
            saved.adopt_as_base(model, name)
        saved.forget(model, name)
