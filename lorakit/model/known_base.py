"""A live base's fingerprint, and whether a model is the base that an adapter was trained on.

Of a pipeline the fingerprint has one for each component that the adapter changes, so that an adapter of the UNet fits
any pipeline with that UNet, and the UNet alone. Its samples have the names that files have; the hash of its shapes is
of names without the component and without `text_model`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import (
    ONLY_ON,
    SAMPLED,
    Weight,
    components_in,
    differences,
    fingerprint,
    needs_quantized,
    of_components,
    rounded_otherwise,
)
from ..adapter.tokens import Tokens
from ..bases.pipeline import TEXT_LEVEL, PipelineModel, component_of, is_text_encoder
from ..errors import AdapterError, listing
from ..layers.bases import base_of
from .state import architecture_of, base_weights


def base_fingerprint(model: nn.Module, changed: Collection[str]) -> dict[str, Any]:
    """Return the fingerprint of a base. `changed`: names of what an adapter changes, which tell a pipeline's
    components.
    """
    weights = base_weights(model)
    if not isinstance(model, PipelineModel):
        return fingerprint(weights, architecture_of(model))
    touched, parts = {component_of(name) for name in changed}, {}
    for component, live in model.components.items():
        if component in touched:
            within = _inside(weights, component)
            own = fingerprint(_without_level(within), architecture_of(live))
            full = {name.removeprefix(f"{TEXT_LEVEL}."): f"{component}.{name}" for name in within}
            sampled = {field: {full[n]: row for n, row in own[field].items()} for field in SAMPLED if field in own}
            parts[component] = own | sampled
    return of_components(parts)


def check_base(model: nn.Module, adapter: Adapter, force: bool, names: Mapping[str, str] | None = None) -> None:
    """Raise AdapterError if the model is not the base the adapter was trained on, unless `force`.

    The base is known by the fingerprint in the adapter's metadata: architecture, shapes and samples of the weights.
    `names`: the model's names of what it has under other names than the adapter.
    """
    expected = adapter.metadata.get("fingerprint")
    if not expected or force:
        return
    if isinstance(expected, Mapping) and isinstance(expected.get("samples"), Mapping):
        # Weights that the adapter replaces may differ: a new classification head and rows for new tokens are random in
        # each process.
        own = {*adapter.saved, *(f"{m}.weight" for m, u in adapter.updates.items() if isinstance(u, Tokens))}
        expected = {**expected, "samples": {n: row for n, row in expected["samples"].items() if n not in own}}
    weights = base_weights(model)
    parts = components_in(expected)
    live = {n: (names or {}).get(n, n) for n in (*adapter.updates, *adapter.saved)}
    if not parts:
        lines = _compare_alone(model, weights, expected, live.values())
    else:
        places = {component_of(name): component_of(live[name]) for name in live}
        lines = [
            line
            for component, place in places.items()
            if component in parts and (place is None or place in model._modules)
            for line in _compare(model, weights, component, parts[component], place, bool(adapter.embeddings))
        ]
    if lines:
        raise AdapterError(
            "the adapter was trained on another base:\n  "
            + "\n  ".join(lines)
            + "\n  load that base, or skip this check: attach(..., force=True); "
            "lorakit image generate, lorakit export: --force-base"
        )


def check_quantization(
    model: nn.Module, modules: Mapping[str, nn.Module], adapter: Adapter, force: bool = False
) -> None:
    """Raise AdapterError if the adapter repairs what quantization lost (LoftQ) and the base is not quantized so, unless
    `force`. `modules`: those that it changes.
    """
    expected = adapter.metadata.get(ONLY_ON)
    if not expected or force:
        return
    kinds = {base_of(module).quantization for module in modules.values()}
    found = listing(sorted(kind or "not quantized" for kind in kinds))
    if expected in kinds:
        other = rounded_otherwise(adapter.metadata.get("fingerprint"), base_weights(model))
        if other is None:
            return
        found = f"rounded to other values, such as those of {other}"
    raise AdapterError(
        f"{needs_quantized(expected)}: this base's are {found}\n"
        "  load the base quantized in that way, or skip this check: attach(..., force=True)"
    )


def _compare_alone(model: nn.Module, weights: Mapping[str, Weight], expected: Any, live: Collection[str]) -> list[str]:
    """Compare the fingerprint of a model by itself; in a pipeline, with the component that has its place."""
    if not isinstance(model, PipelineModel):
        return differences(expected, weights, architecture_of(model))
    lines = []
    touched = {component_of(name) for name in live}
    for component, own in model.components.items():
        if component not in touched:
            continue
        within = _inside(weights, component)
        lines += differences(
            expected, within if TEXT_LEVEL in own._modules else _without_level(within), architecture_of(own)
        )
    return lines


def _compare(
    model: nn.Module,
    weights: Mapping[str, Weight],
    component: str,
    expected: Mapping[str, Any],
    place: str | None,
    more_tokens: bool,
) -> list[str]:
    """Compare a component's fingerprint with its place in a model; None: with the model itself.

    `more_tokens`: an adapter with embeddings was trained on a text encoder that had their rows already.
    """
    sampled = {field: _without_level(_inside(expected[field], component)) for field in SAMPLED if field in expected}
    module = model if place is None else getattr(model, "components", model._modules)[place]
    own = _without_level(weights if place is None else _inside(weights, place))
    if more_tokens and place is not None and is_text_encoder(place):
        own = _longer(own, module, expected["parameters"])
    return differences({**expected, **sampled}, own, architecture_of(module))


def _longer(weights: dict[str, Weight], text_encoder: Any, parameters: int) -> dict[str, Weight]:
    """Return a text encoder's weights as if its token embedding had as many rows more as make up `parameters`."""
    embedding = text_encoder.get_input_embeddings()
    name = next(n for n, module in text_encoder.named_modules() if module is embedding)
    full = f"{name.removeprefix(f'{TEXT_LEVEL}.')}.weight"
    (rows, width), missing = weights[full].shape, parameters - sum(w.numel() for w in weights.values())
    if missing <= 0 or missing % width:
        return weights
    return weights | {full: torch.empty(rows + missing // width, width, device="meta")}


def _inside(named: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}


def _without_level(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{TEXT_LEVEL}."): value for name, value in named.items()}
