"""Attach an adapter to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import ONLY_ON
from ..adapter.tokens import Tokens
from ..adapter.update import Update
from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import PipelineModel, as_module
from ..bases.rope import RECORD, SCALED, check_scaling, with_scaling
from ..config import VIRTUAL, LoraConfig, virtual_kind
from ..errors import AdapterError, ConfigError, StateError, TargetError
from ..layers import fastpath, fused_qkv, peft_layers, saved
from ..layers.bases import base_of, quantized
from ..layers.fused import attention, fused
from ..layers.init.batches import Loss
from ..layers.layer import LoraLayer, add_update, child_name
from ..layers.swap import adopt, release
from ..layers.targets import (
    Targets,
    check_adaptable,
    find_targets,
    in_components,
    module_names,
    shortest_endings,
    with_head,
)
from ..layers.token_targets import repeated, sharing, token_modules, tokens_of, variant_of
from ..layers.updates.update import LiveUpdate, live
from ..layers.virtual.body import body_of
from . import save_pretrained
from .activate import set_active, use_saved
from .effects import check_effects
from .embeddings import embeddings_for, put_in_place
from .expert_updates import stacked
from .fit import check_pooled, fresh_saved, modules_for, saved_for
from .known_base import base_fingerprint, check_base, check_quantization
from .naming import live_names, renamed
from .originals import Originals
from .sharded import check_whole
from .start import Sources, Started, begin, check_sources
from .state import (
    STATE,
    Attached,
    State,
    base_parameters,
    check_new_name,
    check_not_routed,
    check_owner,
    layer_at,
    mark_in_use,
    names_of,
    qualified_name,
)

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
    check_new_name(state, name)
    if state.merged is not None:
        raise StateError(
            f"cannot attach '{name}' while {names_of(state.merged)} is merged\n  call lorakit.unmerge(model) first"
        )
    if trainable is None:
        trainable = isinstance(adapter, LoraConfig)
    check_owner(model)
    peft_layers.check_none(model)
    check_whole(model)
    packed = quantized(model)
    for module_name, module in packed.items():
        base_of(module).check(module, module_name, trainable)
    if isinstance(adapter, LoraConfig):
        check_effects(adapter)
        plan = _begun(
            model, state, _fresh(model, adapter if strict else adapter.replace(strict_targets=False)), sources
        )
    else:
        plan = _loaded(model, adapter, strict, force)
        plan = replace(plan, metadata=with_scaling(model, plan.metadata, trainable))
    for module in packed.values():  # before a start calls the base, as that of a prefix does
        base_of(module).prepare(module)
    try:
        updates = _build(model, plan, child_name(name), trainable)
    except BaseException:
        for module in packed.values() if not state.adapters else ():
            base_of(module).restore(module)
        raise
    # From here on nothing can fail.
    if not state.adapters:
        state.required_grad = {n for n, p in base_parameters(model) if p.requires_grad}
    if not state.adapters or (trainable and not any(a.trainable for a in state.adapters.values())):
        # An optimizer over model.parameters() would train it otherwise, also beside a frozen adapter.
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
    _register(model, state, name, plan, updates, trainable)
    set_active(model, state, {name: 1.0} if activate else state.active)


@dataclass(frozen=True)
class _Plan:
    """What to attach where. `saved`: modules to save, as parameters by full name; `skipped`: module name -> reason.
    `twins`: further modules that share the weight of one of `modules` and get the same update: name -> that module.
    """

    config: LoraConfig
    metadata: Mapping[str, Any]
    modules: Mapping[str, nn.Module]
    saved: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    values: Mapping[str, Update] | None  # None: initialize new ones
    twins: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)  # the adapter's own, where the model has others
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    started: Started | None = None  # the start of new updates

    def parts_of(self, module: str) -> tuple[bool, ...] | None:
        """Return which parts of a packed projection are adapted; None if the module is not packed."""
        if module in self.twins:
            return None
        return self.config.parts_of(module) if self.values is None else self.values[module].parts

    def update_of(self, module: nn.Module, name: str, trainable: bool) -> LiveUpdate:
        """Build a module's live update: a new one, or one with the adapter's values."""
        assert isinstance(module, LoraLayer)
        if self.values is None:
            update = live(module.lora_live(variant_of(self.config, name))).fresh(module, name, self.config, trainable)
            if self.started is not None and name in self.started.factors:
                update.begin(module, self.started.factors[name], self.started.subtracted)
        else:
            value = self.values[name]
            update = live(value.variant).of(module, name, value, self.config, trainable)
        beside = tokens_of(self.config, name) or (name == BODY and self.config.prompt)  # beside factors A and B
        if trainable and self.config.freeze_a and not beside:
            update.freeze_a(module, name)
        return update


def _fresh(model: nn.Module, config: LoraConfig) -> _Plan:
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
    return _Plan(config, metadata, modules, saved_values, targets.skipped, None, _twins(model, modules, config))


def _begun(model: nn.Module, state: State, plan: _Plan, sources: Sources) -> _Plan:
    """Return the plan with the start of its updates, and with the ranks that the start chose."""
    started = begin(model, state, plan.config, plan.modules, sources)
    modules = {m: module for m, module in plan.modules.items() if m not in started.dropped}
    skipped = {**plan.skipped, **started.dropped}
    metadata = plan.metadata if started.only_on is None else {**plan.metadata, ONLY_ON: started.only_on}
    return replace(plan, config=started.config, modules=modules, skipped=skipped, metadata=metadata, started=started)


def _loaded(model: nn.Module, adapter: Adapter, strict: bool, force: bool) -> _Plan:
    adapter = stacked(model, adapter.check())
    live = live_names(model, adapter)
    check_base(model, adapter, force, live)
    if not force:
        check_scaling(getattr(model, "config", None), adapter.metadata)
    adapter = renamed(adapter, live)
    modules, skipped = modules_for(model, adapter, strict)
    check_pooled(model, adapter, force)
    check_quantization(model, modules, adapter, force)
    values = {n: adapter.saved[n] for n in saved_for(model, adapter, strict, skipped)}
    embeddings = {t: adapter.embeddings[t] for t in embeddings_for(model, adapter, strict, skipped)}
    tokens = {m: u for m, u in adapter.updates.items() if isinstance(u, Tokens) and m in modules}

    def same(a: str, b: str) -> bool:
        return tokens[a].ids == tokens[b].ids and torch.equal(tokens[a].weight, tokens[b].weight)

    for m in repeated({m: modules[m] for m in tokens}, same):  # PEFT writes both, and so would they part in training
        del modules[m], tokens[m]
    rows = {m: list(u.ids) for m, u in tokens.items()}
    config = adapter.config.replace(trainable_tokens=rows)
    twins = _twins(model, modules, config)
    names = {new: old for old, new in live.items()}
    return _Plan(config, adapter.metadata, modules, values, skipped, adapter.updates, twins, names, embeddings)


def _twins(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, str]:
    return sharing(model, modules, {m: None for m in modules if tokens_of(config, m)})


def _build(model: nn.Module, plan: _Plan, child: str, trainable: bool) -> dict[str, LiveUpdate]:
    """Give the modules their adapted class and build their updates; registering them is left to `_register`.

    After an error the modules have their own class again.
    """
    every = {**plan.modules, **{name: model.get_submodule(name) for name in plan.twins}}
    fresh = [module for module in every.values() if not isinstance(module, LoraLayer)]
    try:
        for name, module in every.items():
            adopt(module, plan.parts_of(name), name == BODY)
        updates = {name: plan.update_of(module, name, trainable) for name, module in plan.modules.items()}
        by_kind: dict[type[LiveUpdate], list[LiveUpdate]] = {}
        for update in chain.from_iterable(update.modules() for update in updates.values()):
            if isinstance(update, LiveUpdate):  # a DoRA and the one it is built on
                by_kind.setdefault(type(update), []).append(update)
        for kind, alike in by_kind.items():
            kind.join(alike)
        updates |= {name: updates[other].twin() for name, other in plan.twins.items()}
        for full in plan.saved:
            module = model.get_submodule(full.rpartition(".")[0])
            if "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values()):
                raise StateError(
                    f"'{full}' is offloaded, so it cannot be replaced by a trained copy\n  keep this module in memory"
                )
        for name, module in every.items():
            if hasattr(module, child):
                raise StateError(
                    f"'{name}' ({type(module).__name__}) already has an attribute '{child}'\n"
                    "  choose another name for the adapter"
                )
    except Exception:
        for module in fresh:
            release(module)
        raise
    return updates


def _register(
    model: nn.Module, state: State, name: str, plan: _Plan, updates: Mapping[str, LiveUpdate], trainable: bool
) -> None:
    child = child_name(name)
    for m, update in updates.items():
        module = layer_at(model, m)
        add_update(module, child, update.train(module.training))
    use_saved(model, state, ())
    saved.add_copies(model, name, plan.saved, trainable)
    fastpath.close(model)
    fused_qkv.watch(model)
    fused.adopt(model)
    if trainable:
        state.own_attention = attention.use(model) or state.own_attention
    config = plan.config
    targets = [m for m in plan.modules if m != BODY]
    targets = [m for m in targets if variant_of(config, m) != "tokens" or config.variant == "tokens"]
    if targets:
        components = list(dict.fromkeys(m.partition(".")[0] for m in targets))
        config = config.replace(components=components if isinstance(model, PipelineModel) else None)
        every = list(in_components(model, config))
        config = config.replace(targets=shortest_endings(targets, every), exclude=None, layers=None, layers_pattern=[])
    if state.routes is not None:
        state.routes.attached(child, {layer_at(model, m): m for m in updates})
    if not state.adapters:
        save_pretrained.adopt(model)
    state.adapters[name] = Attached(
        config,
        list(updates),
        list(plan.saved),
        trainable,
        plan.metadata,
        plan.skipped,
        plan.names,
        {token: vectors.detach().clone() for token, vectors in plan.embeddings.items()},
    )
    put_in_place(model, state)
    mark_in_use(model, state)
    model.__dict__[STATE] = state
