"""An adapter with other updates, and the config that describes them: targets, ranks, alphas, packed parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...config import VIRTUAL, LoraConfig, variants
from ...module_names import matches
from ..adapter import Adapter
from ..lora import Factors, factors_of
from ..update import Update
from ..virtual_tokens import BODY, VirtualTokens


def with_updates(adapter: Adapter, updates: Mapping[str, Update], **changes: Any) -> Adapter:
    """Return `adapter` with these updates instead of its own, and a config that describes them. `changes`: other
    fields.
    """
    # A config has one rule for all modules: alpha / rank can express every scale.
    if len({f.rslora for f in factors_of(updates).values()}) > 1:
        updates = {m: u.map_factors(_scaled_by_rank) for m, u in updates.items()}
    config: LoraConfig = changes.pop("config", adapter.config)
    virtual = updates.get(BODY)
    if isinstance(virtual, VirtualTokens) and len(updates) == 1:
        config = config.virtual_tokens_alone(virtual.kind)
        return replace(adapter, config=config, updates=dict(updates), **changes)
    config = config if virtual is not None else config.without_virtual_tokens()
    config = describing(config, factors_of(updates), [m for m in updates if m != BODY])
    return replace(adapter, config=config.of_variant(_variant(config, updates)), updates=dict(updates), **changes)


def _variant(config: LoraConfig, updates: Mapping[str, Update]) -> str:
    """Return the kind of these updates, beside which there may be trained tokens, as `LoraConfig.variant` names it."""
    kinds = {u.variant for m, u in updates.items() if m != BODY}
    if config.variant in VIRTUAL and kinds <= {"tokens"}:
        return config.variant
    kinds -= {"tokens"} if len(kinds) > 1 else set()
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= set(variants()) else "lora"


def _scaled_by_rank(f: Factors) -> Factors:
    """Return the same factors with a scale alpha / rank in place of rsLoRA's alpha / √rank."""
    return replace(f, alpha=f.scale * f.rank, rslora=False) if f.rslora else f


def describing(config: LoraConfig, factors: Mapping[str, Factors], modules: list[str]) -> LoraConfig:
    """Return `config` with the targets, ranks and alphas of these modules, changed only where it does not describe them
    yet.

    `modules`: all adapted modules, also those without factors.
    """
    ranks = {m: f.rank for m, f in factors.items()}
    alphas = {m: float(f"{f.alpha:.12g}") for m, f in factors.items()}  # 2 · 0.7 · 49 / 49 is not quite 1.4
    changes: dict[str, Any] = {}
    if any(config.rank_of(m) != rank for m, rank in ranks.items()):
        changes["rank"], changes["rank_pattern"] = _pattern(ranks)
    if any(config.alpha_of(m) != alpha for m, alpha in alphas.items()):
        changes["alpha"], changes["alpha_pattern"] = _pattern(alphas)
    if not (
        isinstance(config.targets, list)
        and modules
        and all(matches(m, config.targets) for m in modules)
        and config.exclude is None
    ):
        endings = sorted({m.rpartition(".")[2] for m in modules})
        changes |= {"targets": endings or config.targets, "exclude": None, "layers": None}
    packed = {m: list(f.parts) for m, f in factors.items() if f.parts}
    if {m: list(config.parts_of(m) or ()) for m in packed} != packed or (config.packed and not packed):
        changes["packed"] = packed
    rslora = bool(factors) and all(f.rslora for f in factors.values())
    return config.replace(rslora=rslora if factors else config.rslora, **changes)


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (the most common value, a pattern for each module that has another)."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(m)}": value for m, value in values.items() if value != common}
