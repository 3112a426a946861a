"""Attach an adapter to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import ONLY_ON
from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import as_module
from ..bases.rope import RECORD, SCALED, with_scaling
from ..config import VIRTUAL, LoraConfig, virtual_kind
from ..errors import AdapterError, ConfigError, StateError, TargetError
from ..layers.init.batches import Loss
from ..layers.targets import Targets, check_adaptable, find_targets, module_names, with_head
from ..layers.token_targets import repeated, token_modules
from ..layers.updates.update import live
from ..layers.virtual.body import body_of
from .effects import check_effects
from .fit import fresh_saved
from .known_base import base_fingerprint
from .originals import Originals
from .plan import Plan, loaded, twins
from .prepared import Prepared, check_free, check_own
from .start import Sources, begin, check_sources
from .state import STATE, State, check_not_routed, qualified_name

DEFAULT = "default"
Model = TypeVar("Model")


def attach(
    model: Model,
    adapter: LoraConfig | Adapter,
    name: str = DEFAULT,
    trainable: bool | None = None,
    *,
    strict: bool = True,
    force: bool = False,
    activate: bool = True,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    originals: Originals | None = None,
) -> Model:
    """Attach an adapter to a model, or to the components of a diffusers pipeline, in place and make it the active one.
    Returns the model or pipeline that it was given.

    A config gives a new adapter (ΔW = 0) that is trainable. An `Adapter` keeps its values and is frozen unless
    `trainable=True`. Either freezes the base, whose `requires_grad` flags `detach` gives back. `strict=False` skips
    what the model lacks, an adapter's updates or a config's targets (`summary` lists them); `force=True` skips the
    check that the base is the one the adapter was trained on; `activate=False` leaves the active adapters as they are.

    For a start that is made from data (`LoraConfig.init`), `batches` yields the first batches of the training data, of
    which `init_batches` are used; `loss(model, batch)` is a batch's loss, by default a transformers model's own,
    `model(**batch).loss`. `originals` (init="loftq") is the checkpoint that the base was quantized from, a folder or
    its tensors by name, by default the one that transformers quantized while loading.

    Raises TargetError, AdapterError, ConfigError or StateError; after an error the model is unchanged.
    """
    sources = Sources(model, batches, loss, originals)
    if isinstance(adapter, LoraConfig):
        check_sources(adapter, sources)
    elif batches is not None or loss is not None or originals is not None:
        raise ConfigError(
            "attach(..., batches=..., loss=..., originals=...) are for the start of a new adapter, and this one is "
            "trained already\n  remove them, or give a LoraConfig"
        )
    return attach_from(model, adapter, sources, name, trainable, strict=strict, force=force, activate=activate)


def attach_from(
    model: Model,
    adapter: LoraConfig | Adapter,
    sources: Sources,
    name: str = DEFAULT,
    trainable: bool | None = None,
    *,
    strict: bool = True,
    force: bool = False,
    activate: bool = True,
) -> Model:
    """Attach as `attach` does. `sources`: what the start of a new adapter is made from, if it needs anything."""
    if not isinstance(adapter, LoraConfig | Adapter):
        raise AdapterError(
            f"attach(model, adapter): got a {qualified_name(adapter)}\n"
            "  expected a lorakit.LoraConfig, or lorakit.Adapter.load(PATH)"
        )
    module = as_module(model)
    if not isinstance(module, nn.Module):
        raise StateError(
            f"attach(model, adapter): the model is a {qualified_name(model)}\n"
            "  expected a torch.nn.Module, or a pipeline of diffusers"
        )
    _attach(module, adapter, name, trainable, strict, force, activate, sources)
    return model


def _attach(
    model: nn.Module,
    adapter: LoraConfig | Adapter,
    name: str,
    trainable: bool | None,
    strict: bool,
    force: bool,
    activate: bool,
    sources: Sources,
) -> None:
    state = model.__dict__.get(STATE) or State()
    check_not_routed(state, "attach")
    check_free(model, name)
    if trainable is None:
        trainable = isinstance(adapter, LoraConfig)
    check_own(model, trainable)
    if isinstance(adapter, LoraConfig):
        check_effects(adapter)
        plan = _begun(
            model, state, _fresh(model, adapter if strict else adapter.replace(strict_targets=False)), sources
        )
    else:
        plan = loaded(model, adapter, strict, force)
        plan = replace(plan, metadata=with_scaling(model, plan.metadata, trainable))
    Prepared(model, name, plan, trainable).attach(model, activate)


def _fresh(model: nn.Module, config: LoraConfig) -> Plan:
    config = with_head(model, config)
    tokens = token_modules(model, config)
    names = module_names(model)
    for m in repeated({m: names[m] for m in tokens}, lambda a, b: tokens[a] == tokens[b]):
        del tokens[m]
    if tokens:
        config = config.replace(trainable_tokens={m: list(ids) for m, ids in tokens.items()})
    virtual = {} if virtual_kind(config) is None else {BODY: body_of(model)}
    targets = Targets({}) if config.variant in VIRTUAL else find_targets(model, config)
    config = live(config.variant).settled(config, names, targets.modules)
    own = targets.modules if config.variant != "tokens" else {}
    both = [m for m in tokens if m in own or any(f".{s}." in f".{m}." for s in config.save_modules)]
    if both:
        raise TargetError(
            f"'{both[0]}' has trainable_tokens, and is adapted or saved in full too (LoraConfig)\n"
            "  name it in one of trainable_tokens, targets and save_modules"
        )
    modules = {**targets.modules, **{m: names[m] for m in tokens}, **virtual}
    check_adaptable(names, {m: names[m] for m in tokens})
    saved_values = fresh_saved(model, config, targets.modules)
    if not modules and not saved_values:
        raise TargetError(
            "nothing would be trained: LoraConfig.targets is 'none', and no bias, save_modules or trainable_tokens is\n"
            "  give one of these, or targets"
        )
    metadata = {"fingerprint": base_fingerprint(model, [*modules, *saved_values])}
    if SCALED in model.__dict__:
        metadata[RECORD] = model.__dict__[SCALED]
    return Plan(config, metadata, modules, saved_values, targets.skipped, None, twins(model, modules, config))


def _begun(model: nn.Module, state: State, plan: Plan, sources: Sources) -> Plan:
    """Return the plan with the start of its updates, and with the ranks that the start chose."""
    started = begin(model, state, plan.config, plan.modules, sources)
    modules = {m: module for m, module in plan.modules.items() if m not in started.dropped}
    skipped = {**plan.skipped, **started.dropped}
    metadata = plan.metadata if started.only_on is None else {**plan.metadata, ONLY_ON: started.only_on}
    return replace(plan, config=started.config, modules=modules, skipped=skipped, metadata=metadata, started=started)
