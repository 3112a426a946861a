"""Where an adapter's updates go on a model, before any module is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..adapter.update import Update
from ..adapter.virtual_tokens import BODY
from ..bases.rope import check_scaling
from ..config import LoraConfig
from ..layers.layer import LoraLayer
from ..layers.token_targets import repeated, sharing, tokens_of, variant_of
from ..layers.updates.update import LiveUpdate, live
from .embeddings import embeddings_for
from .expert_updates import stacked
from .fit import check_pooled, modules_for, saved_for
from .known_base import check_base, check_quantization
from .naming import live_names, renamed
from .start import Started


@dataclass(frozen=True)
class Plan:
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


def loaded(model: nn.Module, adapter: Adapter, strict: bool, force: bool) -> Plan:
    """Plan where a trained adapter goes. `strict`, `force`: as for `attach`, which raises what this does."""
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
    sharers = twins(model, modules, config)
    names = {new: old for old, new in live.items()}
    return Plan(config, adapter.metadata, modules, values, skipped, adapter.updates, sharers, names, embeddings)


def twins(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, str]:
    """Return the modules that get the update of another one, whose weight they share: name -> that module's."""
    return sharing(model, modules, {m: None for m in modules if tokens_of(config, m)})
