"""Parameters that an adapter trains and saves in full: `save_modules` and biases (PEFT's modules_to_save and bias).

The module keeps its class. While the adapter is active, its copies stand where the module's own parameters stood; the
originals wait in a child `lora_saved`, registered there so that they move and are freed with the model.

In a state dict the module's own names are the base's weights, whichever version is in use, and no tensor appears twice:
a checkpoint of the base loads into the base, and transformers, which refuses shared tensors, can save the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import PREFIX, Own
from .walk import base_modules

CHILD = PREFIX + "saved"
BASE = "base"


class SavedParameters(Own):
    """Versions of one module's parameters: `<adapter>` -> {name: parameter}, and the base's own under "base"."""

    def __init__(self) -> None:
        super().__init__()
        self.versions = nn.ModuleDict()
        self.tied: set[tuple[str, str]] = set()  # (version, name) of what another module's child registers too
        self.hooks: list[Any] = []  # handles of the module's state-dict hooks

    def put(self, version: str, parameters: dict[str, nn.Parameter]) -> None:
        """Register a version's parameters, replacing earlier ones."""
        holder = nn.Module()
        for name, parameter in parameters.items():
            holder.register_parameter(name, parameter)
        self.versions[_key(version)] = holder

    def get(self, version: str) -> dict[str, nn.Parameter]:
        """Return a version's parameters by name; empty if there is none."""
        holder = self.versions[_key(version)] if _key(version) in self.versions else None
        return dict(holder.named_parameters(recurse=False)) if holder is not None else {}

    def drop(self, version: str) -> None:
        """Remove a version, if there is one."""
        if _key(version) in self.versions:
            del self.versions[_key(version)]

    def adapters(self) -> list[str]:
        """List the adapters that have a version."""
        return [k[1:] for k in self.versions if k != _key(BASE)]


def _key(version: str) -> str:
    # ModuleDict refuses dots and the names of its own methods ("keys", "items"). The leading "=" distinguishes an
    # adapter named "base" from the base.
    return version if version == BASE else "=" + version.replace(".", "∙")


def keep(adapter: str, module: nn.Module, name: str, value: nn.Parameter, tied: bool = False) -> None:
    """Register `value` as this adapter's version of `module.<name>`, not yet in use. `tied`: also another module's."""
    child = saved_of(module)
    if child is None:
        child = SavedParameters()
        module.add_module(CHILD, child)
        child.hooks = [
            module.register_state_dict_post_hook(_after_state_dict),
            module.register_load_state_dict_pre_hook(_before_loading),
        ]
    if tied:
        child.tied.add((_key(adapter), name))
    original = child.get(BASE).get(name, module._parameters[name])
    assert original is not None
    for version, parameter in ((BASE, original), (adapter, value)):
        child.put(version, child.get(version) | {name: parameter})


class Copy(NamedTuple):
    """An adapter's value of a saved parameter. `tied`: another of the adapter's parameters is the same object."""

    parameter: nn.Parameter
    tied: bool


def copies(model: nn.Module, values: Mapping[str, Tensor], trainable: bool) -> dict[str, Copy]:
    """Copy an adapter's values of saved parameters (PEFT's modules_to_save), by full name, to where the base's are."""
    made: dict[str, Copy] = {}
    kept: list[tuple[Tensor, Tensor, nn.Parameter]] = []
    for full, value in values.items():
        module_name, _, name = full.rpartition(".")
        module = model.get_submodule(module_name)
        child = saved_of(module)
        own = (child.get(BASE) if child else {}).get(name, module._parameters[name])
        assert own is not None
        # Tied weights stay tied: names that share the base's weight and the value share the copy.
        tied = next((p for o, v, p in kept if o is own and (v is value or torch.equal(v, value))), None)
        if tied is None:
            # In the base's precision, since the module's own forward gets activations of that precision.
            copy = nn.Parameter(value.detach().to(own.device, own.dtype, copy=True), requires_grad=trainable)
            kept.append((own, value, copy))
        made[full] = Copy(copy if tied is None else tied, tied is not None)
    return made


def add_copies(model: nn.Module, adapter: str, made: Mapping[str, Copy]) -> None:
    """Register an adapter's copies of saved parameters, not yet in use. The base's own must be in use."""
    for full, copy in made.items():
        module_name, _, name = full.rpartition(".")
        keep(adapter, model.get_submodule(module_name), name, copy.parameter, copy.tied)


def use(model: nn.Module, adapters: Iterable[str]) -> None:
    """Put the versions of these adapters in place, which have none of the same parameter; else the base's own."""
    adapters = tuple(adapters)
    for _, module in base_modules(model):
        child = saved_of(module)
        if child is not None:
            put(module, child, adapters)


def put(module: nn.Module, child: SavedParameters, adapters: Iterable[str]) -> None:
    """Put adapters' versions of one module's parameters in place; the base's own where they have none."""
    module._parameters.update(child.get(BASE))
    for adapter in adapters:
        module._parameters.update(child.get(adapter))


def adopt_as_base(model: nn.Module, adapter: str) -> None:
    """Make an adapter's versions the base's own, which is what merging does with saved weights."""
    for _, module in base_modules(model):
        child = saved_of(module)
        if child is not None:
            child.put(BASE, child.get(BASE) | child.get(adapter))


def forget(model: nn.Module, adapter: str) -> None:
    """Remove an adapter's versions. They must not be in use. The child is removed with the last of them."""
    for _, module in base_modules(model):
        child = saved_of(module)
        if child is None:
            continue
        child.drop(adapter)
        child.tied = {(version, name) for version, name in child.tied if version in child.versions}
        if not child.adapters():
            for name, parameter in child.get(BASE).items():
                module._parameters[name] = parameter
            for handle in child.hooks:
                handle.remove()
            del module._modules[CHILD]


def saved_of(module: nn.Module) -> SavedParameters | None:
    """Return the module's child of saved parameters, None if it has none."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, SavedParameters) else None


def _after_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give the module's own names the base's weights, and every other version its one place in the child."""
    child = saved_of(module)
    assert child is not None
    versions = f"{prefix}{CHILD}.versions."
    for name in child.get(BASE):
        state[prefix + name] = state.pop(f"{versions}{BASE}.{name}")
    for version, name in child.tied:
        del state[f"{versions}{version}.{name}"]


def _before_loading(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> None:
    """The way back: torch is about to copy `state` into the versions and into what is in use, which is one of them."""
    child = saved_of(module)
    assert child is not None
    versions = f"{prefix}{CHILD}.versions."
    for version, name in child.tied:
        state.setdefault(f"{versions}{version}.{name}", child.versions[version]._parameters[name])
    for name in child.get(BASE):
        if prefix + name in state:
            state[f"{versions}{BASE}.{name}"] = state[prefix + name]
        used = module._parameters[name]
        for version, holder in child.versions.items():
            if version != BASE and holder._parameters.get(name) is used:
                state[prefix + name] = state.get(f"{versions}{version}.{name}", used)
