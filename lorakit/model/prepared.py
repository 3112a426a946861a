"""An adapter that is checked and built for a model, before it is attached: `attach` in two steps.

    prepared = prepare(model, adapter, "sql")     # reads the model; a forward may run meanwhile, in another thread
    prepared.attach(model)                        # registers what was built: a few milliseconds, whatever its size
    lorakit.detach(model, "sql")
    prepared.attach(model)                        # again, without reading or copying anything

A server that attaches between two steps of a running batch needs the second one short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import PipelineModel, as_module
from ..bases.rope import with_scaling
from ..config import LoraConfig
from ..errors import StateError
from ..layers import fastpath, fused_qkv, peft_layers, saved
from ..layers.bases import base_of, quantized
from ..layers.fused import attention, fused
from ..layers.layer import LoraLayer, add_update, child_name
from ..layers.swap import adopt, release
from ..layers.targets import in_components, module_names, shortest_endings
from ..layers.token_targets import variant_of
from ..layers.updates.update import LiveUpdate
from . import save_pretrained
from .activate import set_active, use_saved
from .embeddings import put_in_place
from .plan import Plan, loaded
from .sharded import check_whole
from .state import (
    STATE,
    Attached,
    State,
    base_parameters,
    check_new_name,
    check_not_routed,
    check_owner,
    mark_in_use,
    names_of,
)


def prepare(model: Any, adapter: Adapter, name: str, *, strict: bool = True, force: bool = False) -> Prepared:
    """Check a trained adapter against a model and build its updates, which copies its values to the model's device.

    The model is only read. Its parameters must be the base's own, and nothing may be attached or detached meanwhile. If
    no adapter was attached to some of its modules before, their updates are built by `Prepared.attach`. `strict` and
    `force`: as for `attach`, which raises what this does.
    """
    model = as_module(model)
    check_free(model, name)
    check_own(model, trainable=False)
    plan = loaded(model, adapter, strict, force)
    prepared = Prepared(model, name, replace(plan, metadata=with_scaling(model, plan.metadata, False)))
    if prepared.is_adopted():
        prepared.build(model)
    return prepared


def check_free(model: nn.Module, name: str) -> None:
    """Raise StateError for a name that cannot be attached, and while an adapter is merged."""
    state = model.__dict__.get(STATE) or State()
    check_new_name(state, name)
    if state.merged is not None:
        raise StateError(
            f"cannot attach '{name}' while {names_of(state.merged)} is merged\n  call lorakit.unmerge(model) first"
        )


def check_own(model: nn.Module, trainable: bool) -> None:
    """Raise StateError for a model that is sharded, repacked, another's part, or adapted by PEFT."""
    check_owner(model)
    peft_layers.check_none(model)
    check_whole(model)
    for module_name, module in quantized(model).items():
        base_of(module).check(module, module_name, trainable)


class Prepared:
    """A plan and what was built for it. While it is attached, the tensors here are the model's.

    `updates`: by the full names of the modules, twins among them; `copies`: of the saved parameters, by full name.
    """

    def __init__(self, model: nn.Module, name: str, plan: Plan, trainable: bool = False):
        self.name, self.plan, self.trainable = name, plan, trainable
        self.updates: dict[str, LiveUpdate] = {}
        self.copies: dict[str, saved.Copy] = {}
        self.saved = list(plan.saved)
        self.parked = False  # its tensors are in the processor's memory, and must be moved before it is attached
        self._devices: dict[str, torch.device] = {}
        self.is_built = False
        self._built_for: dict[str, Any] = {}  # the parts that each layer had then
        self._config = _resolved(model, plan)
        self.modules = {**plan.modules, **{twin: model.get_submodule(twin) for twin in plan.twins}}
        self._parts = {m: plan.parts_of(m) for m in self.modules}

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it holds."""
        for update in self.updates.values():
            yield from chain(update.parameters(), update.buffers())
        yield from (copy.parameter for copy in self.copies.values())

    @property
    def bytes(self) -> int:
        """The memory that its tensors take, each counted once."""
        return sum({id(t): t.numel() * t.element_size() for t in self.tensors}.values())

    def is_adopted(self) -> bool:
        """Whether all its modules have their adapted class already, so that updates can be built for them."""
        return all(isinstance(module, LoraLayer) for module in self.modules.values())

    @property
    def on_accelerator(self) -> bool:
        """Whether some of its tensors are in another memory than the processor's."""
        return any(tensor.device.type != "cpu" for tensor in self.tensors)

    @property
    def outdated(self) -> bool:
        """Whether it was built for packed projections that other adapters have unpacked since, or the other way round.
        It cannot be attached any more then, and must be prepared again.
        """
        return self.is_built and any(
            (_parts_of(module) if isinstance(module, LoraLayer) else self._parts[m]) != self._built_for[m]
            for m, module in self.modules.items()
        )

    def forget_computed(self) -> None:
        """Drop what updates computed from their parameters and keep for the next forward."""
        for update in self.updates.values():
            for each in update.modules():
                if isinstance(each, LiveUpdate):
                    each.forget_computed()

    def park(self) -> None:
        """Move its tensors to the processor's memory, while it is not attached."""
        self._devices = {name: next(u.parameters(), torch.empty(0)).device for name, u in self.updates.items()}
        self._devices |= {full: copy.parameter.device for full, copy in self.copies.items()}
        self._move(dict.fromkeys(self._devices, torch.device("cpu")))
        self.parked = True

    def unpark(self) -> None:
        """Move its tensors back to where they were before `park`."""
        self._move(self._devices)
        self.parked = False

    def _move(self, devices: Mapping[str, torch.device]) -> None:
        for name, update in self.updates.items():
            update.to(devices[name])
        for full, copy in self.copies.items():
            copy.parameter.data = copy.parameter.data.to(devices[full])

    def build(self, model: nn.Module) -> None:
        """Build the updates and the copies of saved parameters, for modules that have their adapted class."""
        plan, modules = self.plan, self.modules
        updates = {name: plan.update_of(modules[name], name, self.trainable) for name in plan.modules}
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
        for name, module in modules.items():
            if hasattr(module, child_name(self.name)):
                raise StateError(
                    f"'{name}' ({type(module).__name__}) already has an attribute '{child_name(self.name)}'\n"
                    "  choose another name for the adapter"
                )
        self.copies = saved.copies(model, plan.saved, self.trainable)
        self.updates = {name: update.train(modules[name].training) for name, update in updates.items()}
        self.is_built, self._built_for = True, {m: _parts_of(module) for m, module in modules.items()}
        self.plan = replace(plan, saved={}, values=None, started=None)  # else it would be in memory twice

    def attach(self, model: Any, activate: bool = False) -> None:
        """Attach it. Without `activate`, the active adapters stay as they are.

        Raises StateError inside `route` and as `prepare` does, and what building raises if that was left to this. After
        an error the model is unchanged.
        """
        model = as_module(model)
        state = model.__dict__.get(STATE) or State()
        check_not_routed(state, "attach")
        check_free(model, self.name)
        first = not state.adapters
        packed = list(quantized(model).values()) if first else []
        for module in packed:  # before a start calls the base, as that of a prefix does
            base_of(module).prepare(module)
        fresh: list[nn.Module] = []
        try:
            fresh = self._adopt(model)
            if not self.is_built:
                self.build(model)
        except BaseException:
            for module in fresh:
                release(module)
            for module in packed:
                base_of(module).restore(module)
            raise
        # From here on nothing can fail.
        if first:
            state.required_grad = {n for n, p in base_parameters(model) if p.requires_grad}
        if first or (self.trainable and not any(a.trainable for a in state.adapters.values())):
            # An optimizer over model.parameters() would train it otherwise, also beside a frozen adapter.
            for _, parameter in base_parameters(model):
                parameter.requires_grad_(False)
        self._register(model, state, bool(fresh))
        if activate:
            set_active(model, state, {self.name: 1.0})
        elif self.saved:
            use_saved(model, state, state.active)

    def _adopt(self, model: nn.Module) -> list[nn.Module]:
        """Give the modules their adapted class, and return those that did not have it. After an error none has it."""
        if self.is_adopted():
            return []
        if self.is_built:  # a module has lost its last adapter since, and weights of experts are other objects then
            names = module_names(model)
            self.modules = {m: names.get(m, module) for m, module in self.modules.items()}
        fresh = [module for module in self.modules.values() if not isinstance(module, LoraLayer)]
        try:
            for name, module in self.modules.items():
                adopt(module, self._parts[name], name == BODY)
        except BaseException:
            for module in fresh:
                release(module)
            raise
        return fresh

    def _register(self, model: nn.Module, state: State, more_adapted: bool) -> None:
        plan, child = self.plan, child_name(self.name)
        for m, update in self.updates.items():
            add_update(self.modules[m], child, update)
        if self.copies:
            use_saved(model, state, ())
            saved.add_copies(model, self.name, self.copies)
        if more_adapted or self.copies:
            fastpath.close(model)
            fused_qkv.watch(model)
            fused.adopt(model)
        if self.trainable:
            state.own_attention = attention.use(model) or state.own_attention
        if state.routes is not None:
            layers: dict[Any, str] = {self.modules[m]: m for m in self.updates}
            state.routes.attached(child, layers)
        if not state.adapters:
            save_pretrained.adopt(model)
        state.adapters[self.name] = Attached(
            self._config,
            list(self.updates),
            self.saved,
            self.trainable,
            plan.metadata,
            plan.skipped,
            plan.names,
            {token: vectors.detach().clone() for token, vectors in plan.embeddings.items()},
        )
        put_in_place(model, state)
        mark_in_use(model, state)
        model.__dict__[STATE] = state


def _parts_of(layer: nn.Module) -> tuple[bool, ...] | None:
    """Return the parts of a layer that is adapted as a packed projection; None for others."""
    found: tuple[bool, ...] | None = getattr(layer, "lora_parts", None)
    return found


def _resolved(model: nn.Module, plan: Plan) -> LoraConfig:
    """Return the plan's config with `targets` of this model's names."""
    config = plan.config
    targets = [m for m in plan.modules if m != BODY]
    targets = [m for m in targets if variant_of(config, m) != "tokens" or config.variant == "tokens"]
    if not targets:
        return config
    components = list(dict.fromkeys(m.partition(".")[0] for m in targets))
    config = config.replace(components=components if isinstance(model, PipelineModel) else None)
    every = list(in_components(model, config))
    return config.replace(targets=shortest_endings(targets, every), exclude=None, layers=None, layers_pattern=[])
