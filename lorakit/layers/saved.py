"""Parameters that an adapter trains and saves in full: `save_modules` and biases (PEFT's modules_to_save and bias).

The module keeps its class. While the adapter is active, its copies replace the module's own parameters. The originals
are registered in a child `lora_saved`, so that they move and are freed with the model.
"""

from __future__ import annotations

from torch import nn

from .layer import PREFIX, Own
from .walk import base_modules

CHILD = PREFIX + "saved"
BASE = "base"


class SavedParameters(Own):
    """Versions of one module's parameters: `<adapter>` -> {name: parameter}, and the base's own under "base"."""

    def __init__(self) -> None:
        super().__init__()
        self.versions = nn.ModuleDict()

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


def keep(adapter: str, module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Register `value` as this adapter's version of `module.<name>`, without using it yet."""
    child = saved_of(module)
    if child is None:
        child = SavedParameters()
        module.add_module(CHILD, child)
    original = child.get(BASE).get(name, module._parameters[name])
    assert original is not None
    for version, parameter in ((BASE, original), (adapter, value)):
        child.put(version, child.get(version) | {name: parameter})


def use(model: nn.Module, adapter: str | None) -> None:
    """Switch all modules to an adapter's versions, or to the base's own where it has none (None: everywhere)."""
    for _, module in base_modules(model):
        child = saved_of(module)
        if child is None:
            continue
        chosen = child.get(BASE) | (child.get(adapter) if adapter is not None else {})
        for name, parameter in chosen.items():
            module._parameters[name] = parameter


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
        if not child.adapters():
            for name, parameter in child.get(BASE).items():
                module._parameters[name] = parameter
            del module._modules[CHILD]


def saved_of(module: nn.Module) -> SavedParameters | None:
    """Return the module's child of saved parameters, None if it has none."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, SavedParameters) else None
