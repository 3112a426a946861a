"""Match an adapter's modules to a model's; raise where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import PipelineModel, component_of
from ..config import LoraConfig, live_kinds
from ..errors import AdapterError, TargetError, did_you_mean, listing
from ..layers.bases import quantized
from ..layers.targets import check_adaptable, check_packed, find_saved, module_names
from ..layers.virtual.body import body_of, is_decoder
from .state import architecture_of, base_parameters, is_adapter_key


def modules_for(model: nn.Module, adapter: Adapter, strict: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the modules that the adapter changes.

    Returns them by name, and the reason for each module name that the model lacks (only with `strict=False`). Raises
    TargetError for missing or unsupported modules, AdapterError for updates that cannot run live or do not fit.
    """
    for m, update in adapter.updates.items():
        _check_live(m, update)
    names = module_names(model)
    if BODY in adapter.updates:
        names[BODY] = body_of(model)
    modules = {m: names[m] for m in adapter.updates if m in names}
    missing = [m for m in adapter.updates if m not in names]
    if missing and (strict or not modules):
        raise TargetError(
            f"{len(missing)} of the adapter's {len(adapter.updates)} modules are not in this {architecture_of(model)}: "
            f"{listing(missing, 3)}{did_you_mean(missing[0], names)}\n"
            f"{_other_components(model, missing)}strict=False attaches the rest and lists these"
        )
    check_adaptable(names, {m: module for m, module in modules.items() if m != BODY})
    first: dict[int, str] = {}
    for m, module in modules.items():
        parts = adapter.updates[m].parts
        if parts is not None:
            check_packed(m, module, len(parts))
        if first.setdefault(id(module), m) != m:
            raise TargetError(
                f"the adapter has updates for '{first[id(module)]}' and '{m}', which are the same module in this "
                "model\n"
                "  keep one of them: adapter.prune([...])"
            )
    return modules, dict.fromkeys(missing, "no such module in this model")


def check_pooled(model: nn.Module, adapter: Adapter, force: bool) -> None:
    """Raise AdapterError for PEFT's virtual tokens of a classifier whose head reads the first position, unless `force`:
    in PEFT that is a virtual token's, and here the row's own first token's.
    """
    own, ours = adapter.updates.get(BODY), "fingerprint" in adapter.metadata
    if own is None or own.variant == "prefix" or ours or force or adapter.config.task != "SEQ_CLS":
        return
    body: Any = body_of(model)
    if not is_decoder(body.config) and getattr(body, "pooler", None) is None:
        raise AdapterError(
            f"in PEFT the head of a {architecture_of(model)} with virtual tokens reads the first of these, and here it "
            "reads the row's own first token, so this adapter would predict otherwise\n"
            "  use it with PEFT; or attach it to go on training it: attach(..., force=True)"
        )


def _other_components(model: nn.Module, missing: list[str]) -> str:
    """Say which components of a pipeline the missing modules are of; else ask whether it is the right model."""
    theirs = dict.fromkeys(component for name in missing if (component := component_of(name)) is not None)
    if isinstance(model, PipelineModel):
        absent = [component for component in theirs if component not in model.components]
        if absent:
            return f"  the pipeline has no {listing(absent)}, only {listing(model.components)}; "
    elif theirs:
        return f"  they are of a pipeline's {listing(theirs)}: attach the adapter to the pipeline; "
    return "  is the adapter for another model? "


def is_live(adapter: Adapter) -> bool:
    """Whether all updates can be attached to a live model."""
    return not any(_not_live(u) for u in adapter.updates.values())


def _not_live(update: Update) -> list[str]:
    """Return the kinds that the update is made of and that a live model does not take."""
    return [kind for kind in update.live_variants if kind not in live_kinds()]


def _check_live(module: str, update: Update) -> None:
    kinds = _not_live(update)
    if not kinds:
        return
    if update.variant not in kinds:
        raise AdapterError(
            f"'{module}' has a DoRA over an update of kind '{kinds[0]}', which cannot be attached to a live model yet\n"
            "  merge it into the base's files (lorakit merge), or use it in the library that trained it"
        )
    raise AdapterError(
        f"'{module}' has an update of kind '{update.variant}', which cannot be attached to a live model yet\n"
        "  adapter.resize(rank=...) approximates it by low-rank factors and reports the error"
    )


def saved_for(model: nn.Module, adapter: Adapter, strict: bool, skipped: dict[str, str]) -> list[str]:
    """Return the names of the adapter's saved parameters that the model has; adds the others to `skipped`.

    Raises TargetError for missing ones if `strict`, AdapterError for other shapes than the model's.
    """
    if not adapter.saved:
        return []
    own = dict(base_parameters(model, every_name=True))
    missing = [n for n in adapter.saved if n not in own]
    buffers = [n for n in missing if n in dict(model.named_buffers())]
    if buffers and strict:
        raise TargetError(
            f"the adapter has values for buffers of the base ({listing(buffers, 3)}), which lorakit cannot switch\n"
            "  strict=False attaches the rest and keeps the base's buffers"
        )
    if missing and strict:
        raise TargetError(
            f"{len(missing)} of the adapter's saved weights are not in this {architecture_of(model)}: "
            f"{listing(missing, 3)}{did_you_mean(missing[0], own)}\n"
            "  is the adapter for another model? strict=False attaches the rest and lists these"
        )
    skipped |= dict.fromkeys(missing, "no such parameter in this model")
    packed = [m for m in quantized(model) if f"{m}.weight" in adapter.saved]
    if packed:
        raise AdapterError(
            f"the adapter has a full weight for '{packed[0]}', which this base holds quantized\n"
            "  attach it to the unquantized base, or load this one with that module left unquantized"
        )
    for n, value in adapter.saved.items():
        if n in own and own[n].shape != value.shape:
            raise AdapterError(
                f"the adapter's saved weight '{n}' has shape {list(value.shape)}; expected the model's, "
                f"{list(own[n].shape)}"
            )
    return [n for n in adapter.saved if n in own]


def fresh_saved(model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of `save_modules` and the trained biases of a new adapter, by name.

    Raises TargetError for a module without parameters, or with buffers, which an adapter cannot hold.
    """
    values: dict[str, Tensor] = {}
    for name, module in find_saved(model, config).items():
        if quantized(module):
            raise TargetError(
                f"'{name}' is quantized, and quantized weights cannot be trained (LoraConfig.save_modules)\n"
                "  load the base with that module left unquantized, or adapt it: LoraConfig.targets"
            )
        own = {f"{name}.{n}": p for n, p in base_parameters(module)}
        if not own:
            raise TargetError(f"'{name}' has no parameters to train (LoraConfig.save_modules)")
        buffers = [n for n, _ in module.named_buffers() if n in module.state_dict() and not is_adapter_key(n)]
        if buffers:
            raise TargetError(
                f"'{name}' has buffers ({listing(buffers, 3)}), which an adapter cannot hold "
                "(LoraConfig.save_modules)\n"
                "  name modules inside it that have none"
            )
        values |= own
    if config.bias == "lora_only":
        values |= {f"{m}.bias": p for m, module in targets.items() for n, p in base_parameters(module) if n == "bias"}
    elif config.bias == "all":
        values |= {n: p for n, p in base_parameters(model) if n == "bias" or n.endswith(".bias")}
    if not values:
        return values
    # Train a tied weight under all of its names.
    shared = {id(p) for p in values.values()}
    return values | {n: p for n, p in base_parameters(model) if id(p) in shared}
