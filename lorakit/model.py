"""An adapter meets a live model: attach, capture, activate, merge, unmerge, detach.

Every function takes the model first and changes it in place. What a model carries is written in one place, `attached.State`,
kept on the model itself: there is no global state and no wrapper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .adapter.adapter import Adapter
from .adapter.fingerprint import fingerprint
from .adapter.lora import Factors
from .attached import (
    STATE,
    Attached,
    State,
    architecture_of,
    attached_of,
    base_parameters,
    check_new_name,
    check_not_routed,
    layer_at,
    layers_of,
    names_of,
    state_of,
)
from .config import LoraConfig
from .errors import AdapterError, StateError, listing
from .fit import check_base, check_tied, fresh_saved, modules_for, saved_for
from .layers import fastpath, saved
from .layers.fused import attention, fused
from .layers.layer import COUNT, LoraFactors, LoraLayer, add_factors, child_name, remove_factors
from .layers.merge import merge_module, unmerge_module
from .layers.place import factors_for, fresh_for
from .layers.swap import adopt, release
from .layers.targets import find_targets, module_names, shortest_endings, with_head

DEFAULT = "default"


def attach(
    model: nn.Module,
    adapter: LoraConfig | Adapter,
    name: str = DEFAULT,
    trainable: bool | None = None,
    *,
    strict: bool = True,
    force: bool = False,
) -> nn.Module:
    """Put an adapter on the model, in place, and make it the active one. Returns the model.

    A config gives a fresh adapter (ΔW = 0), trainable, and freezes the base; an `Adapter` comes with its factors and is not
    trainable, unless said. `strict=False` lets an adapter's factors that fit no module pass (`summary` lists them);
    `force=True` attaches although the base differs from the one the adapter was trained on.
    Raises TargetError, AdapterError or StateError, and then leaves the model as it was.
    """
    if not isinstance(adapter, LoraConfig | Adapter):
        raise AdapterError(
            f"attach(model, adapter): got a {_kind(adapter)}\n  expected a lorakit.LoraConfig, or lorakit.Adapter.load(PATH)"
        )
    state = model.__dict__.get(STATE) or State()
    check_not_routed(state, "attach")
    check_new_name(state, name)
    if state.merged is not None:
        raise StateError(f"cannot attach '{name}' while {names_of(state.merged)} is merged\n  lorakit.unmerge(model) first")
    if trainable is None:
        trainable = isinstance(adapter, LoraConfig)
    base = dict(base_parameters(model))
    config, metadata = (with_head(model, adapter), {}) if isinstance(adapter, LoraConfig) else (adapter.config, adapter.metadata)
    if isinstance(adapter, LoraConfig):
        targets = find_targets(model, config)
        modules, skipped = targets.modules, targets.skipped
        values = fresh_saved(model, config, modules)
        metadata = {"fingerprint": fingerprint(base, architecture_of(model))}
    else:
        adapter.check()
        check_base(model, adapter, force)
        modules, skipped = modules_for(model, adapter, strict)
        values = {n: adapter.saved[n] for n in saved_for(model, adapter, strict, skipped)}
    child = child_name(name)
    swapped = [module for module in modules.values() if not isinstance(module, LoraLayer)]
    try:
        for m, module in modules.items():
            adopt(module, config.parts_of(m) if isinstance(adapter, LoraConfig) else adapter.factors[m].parts)
        if isinstance(adapter, LoraConfig):
            built = {m: fresh_for(module, m, config, trainable) for m, module in modules.items()}
        else:
            built = {m: factors_for(module, m, adapter.factors[m], config.dropout, trainable) for m, module in modules.items()}
        for full in values:
            module = model.get_submodule(full.rpartition(".")[0])
            if "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values()):
                raise StateError(f"'{full}' is offloaded, so a copy cannot be trained in its place\n  keep this module in memory")
        for m, module in modules.items():
            if hasattr(module, child):
                raise StateError(f"'{m}' ({type(module).__name__}) has an attribute '{child}' of its own\n  choose another name")
    except Exception:
        for module in swapped:
            release(module)
        raise
    # From here on nothing can fail.
    if not state.adapters:
        state.required_grad = {n for n, p in base.items() if p.requires_grad}
    if trainable and not any(a.trainable for a in state.adapters.values()):
        for parameter in base.values():
            parameter.requires_grad_(False)
    for m, module in modules.items():
        add_factors(module, child, built[m].train(module.training))
    _use_saved(model, state, None)
    _keep_whole(model, name, values, trainable)
    fastpath.close(model)
    fused.adopt(model)
    if trainable:
        state.own_attention = attention.use(model) or state.own_attention
    if modules:
        config = config.replace(targets=shortest_endings(list(modules), list(module_names(model))), exclude=None, layers=None)
    if state.routes is not None:
        state.routes.attached(child, {module: m for m, module in modules.items()})  # type: ignore[misc]
    state.adapters[name] = Attached(config, list(modules), list(values), trainable, metadata, skipped)
    model.__dict__[STATE] = state
    _activate(model, state, {name: 1.0})
    return model


def capture(model: nn.Module, name: str | None = None) -> Adapter:
    """An attached adapter as a value: copies of its factors and saved weights, on the CPU. `name`: may be left out if it is the only one."""
    state = state_of(model)
    attached = attached_of(state, name)
    name = name or next(iter(state.adapters))
    factors = {}
    for m in attached.modules:
        layer = layer_at(model, m)
        child: LoraFactors = layer._modules[child_name(name)]  # type: ignore[attr-defined]
        A, B = layer.lora_full(child)
        parts = getattr(layer, "lora_parts", None) if child.B.dim() == 3 and child.A.dim() == 2 else None
        factors[m] = Factors(
            _copy(A), _copy(B), child.alpha, layer.lora_kind, child.rslora, layer.lora_transposed and layer.lora_kind == "linear",  # type: ignore[arg-type]
            groups=getattr(layer, "groups", 1) if layer.lora_kind == "conv" else 1, parts=parts,
        )  # fmt: skip
    kept = {}
    for full in attached.saved:
        module_name, _, last = full.rpartition(".")
        child_saved = saved.saved_of(model.get_submodule(module_name))
        assert child_saved is not None
        kept[full] = _copy(child_saved.get(name)[last])
    return Adapter(attached.config, factors, kept, copy.deepcopy(dict(attached.metadata)))


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Choose what the model computes with: one adapter, several with weights (their updates are summed), or None, the base alone."""
    state = state_of(model)
    check_not_routed(state, "activate")
    if not isinstance(which, str | Mapping | None):
        raise StateError(
            f"activate(model, which): got a {_kind(which)}\n  expected a name, None, or names with weights such as {{'a': 0.7, 'b': 0.3}}"
        )
    wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        attached_of(state, name)
        if not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter '{name}' is {weight!r}; expected a finite number")
    if state.merged is not None:
        raise StateError(f"{names_of(state.merged)} is merged into the base; lorakit.unmerge(model) before activating another")
    holding = [n for n in wanted if state.adapters[n].saved]
    if len(holding) > 1 or (holding and wanted[holding[0]] != 1.0):
        raise StateError(
            f"adapter '{holding[0]}' replaces whole weights ({listing(state.adapters[holding[0]].saved, 3)}), which cannot be mixed or scaled\n"
            "  activate it alone or beside adapters without saved weights, with weight 1"
        )
    _activate(model, state, wanted)


def active(model: nn.Module) -> dict[str, float]:
    """The active adapters and their weights; empty for the base alone."""
    return dict(state_of(model).active)


def adapters(model: nn.Module) -> list[str]:
    """The names of the attached adapters."""
    state = model.__dict__.get(STATE)
    return list(state.adapters) if state else []


def merge(model: nn.Module) -> None:
    """Add the active adapters' ΔW into the base's weights. `unmerge` gives every bit back.

    It keeps what that needs, a quarter to one byte a merged weight. Raises StateError if something is merged already,
    and where merging would be wrong: a tied weight of which only one user is adapted, quantized or offloaded weights.
    """
    state = state_of(model)
    check_not_routed(state, "merge")
    if state.merged is not None:
        raise StateError(f"{names_of(state.merged)} is merged already\n  lorakit.unmerge(model) first")
    if not state.active:
        raise StateError("no adapter is active, so there is nothing to merge\n  lorakit.activate(model, name) first")
    layers = {m: layer for m, layer in layers_of(model) if layer.lora_in_use()}
    check_tied(model, layers)
    done: list[LoraLayer] = []
    try:
        for m, layer in layers.items():
            merge_module(layer, m)
            done.append(layer)
    except Exception:
        for layer in done:
            unmerge_module(layer, "a module")
        raise
    state.merged = dict(state.active)


def unmerge(model: nn.Module) -> None:
    """Take the merged ΔW out of the base's weights, which then have their original bits."""
    state = state_of(model)
    if state.merged is None:
        raise StateError("nothing is merged into this model")
    for m, layer in layers_of(model):
        if layer.lora_merged is not None:
            unmerge_module(layer, m)
    state.merged = None


def detach(model: nn.Module, name: str | None = None, merged: Literal["keep", "undo"] | None = None) -> nn.Module:
    """Remove all adapters (or one): classes, names, gradients' flags and bits are then as if lorakit had never been here.

    While something is merged, `merged` must say what becomes of it: "keep" leaves ΔW (and saved weights) in the base, a
    plain merged model; "undo" restores the base first.
    """
    state = state_of(model)
    check_not_routed(state, "detach")
    if merged not in (None, "keep", "undo"):
        raise StateError(f"detach(model, merged={merged!r}): expected 'keep' or 'undo'")
    if state.merged is not None:
        if merged is None:
            raise StateError(
                f"{names_of(state.merged)} is merged: say detach(model, merged='keep') for a plain merged model, or merged='undo' for the base"
            )
        if merged == "undo":
            unmerge(model)
        elif name is not None:
            raise StateError("merged='keep' removes all adapters; leave `name` out")
    keep = state.active if merged == "keep" and state.merged is not None else {}
    gone = list(state.adapters) if name is None else [name]
    if name is None:
        state.routes = None
    for n in gone:
        attached_of(state, n)
    for n in gone:
        _remove(model, state, n, keep_saved=n in keep)
    if not state.adapters:
        del model.__dict__[STATE]
        for full, parameter in model.named_parameters():
            parameter.requires_grad_(full in state.required_grad)
    else:
        _activate(model, state, {n: w for n, w in state.active.items() if n in state.adapters})
    fastpath.reopen(model)
    if state.adapters:
        fused.adopt(model)  # what only the adapter that left kept from being fused
    else:
        fused.release(model)
        attention.leave(model)
    return model


def _keep_whole(model: nn.Module, name: str, values: Mapping[str, Tensor], trainable: bool) -> None:
    """Register an adapter's versions of whole parameters. The base's own must be in place."""
    copies: list[tuple[Tensor, Tensor, nn.Parameter]] = []
    for full, value in values.items():
        module_name, _, last = full.rpartition(".")
        module = model.get_submodule(module_name)
        own = module._parameters[last]
        assert own is not None
        # Names that share the base's weight and get the same value share the copy too: tied weights stay tied.
        kept = next((p for o, v, p in copies if o is own and (v is value or torch.equal(v, value))), None)
        if kept is None:
            # In the base's precision: the module is called as it is, with activations of that precision.
            kept = nn.Parameter(value.detach().to(own.device, own.dtype, copy=True), requires_grad=trainable)
            copies.append((own, value, kept))
        saved.keep(name, module, last, kept)


def _activate(model: nn.Module, state: State, wanted: dict[str, float]) -> None:
    state.active = wanted
    chosen = [(child_name(n), w) for n, w in wanted.items()]
    for _, layer in layers_of(model):
        layer.lora_active = tuple((child, w) for child, w in chosen if child in layer._modules)  # type: ignore[attr-defined]
    _use_saved(model, state, next((n for n in wanted if state.adapters[n].saved), None))


def _use_saved(model: nn.Module, state: State, name: str | None) -> None:
    """Put an adapter's whole weights in place, or the base's own; most adapters have none, and then there is nothing to look for."""
    if any(attached.saved for attached in state.adapters.values()):
        saved.use(model, name)


def _remove(model: nn.Module, state: State, name: str, keep_saved: bool) -> None:
    attached = state.adapters.pop(name)
    child, ranks = child_name(name), {}
    for m in attached.modules:
        module = layer_at(model, m)
        ranks[module] = remove_factors(module, child).A.shape[0]
    left = {module for module in ranks if module.__dict__[COUNT]}
    if state.routes is not None:
        state.routes.detached(child, ranks, left)
    for module in ranks:
        if module not in left:
            release(module)  # type: ignore[arg-type]
    if attached.saved:
        if keep_saved:
            saved.adopt_as_base(model, name)
        saved.forget(model, name)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
