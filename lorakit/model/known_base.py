"""A live base's fingerprint, and whether a model is the base that an adapter was trained on.

Of a pipeline the fingerprint is one for each component that the adapter changes, so that an adapter of the UNet fits
any pipeline with that UNet, and the UNet alone:

    {"architecture": "UNet2DConditionModel + CLIPTextModel", "parameters": ..., "shapes": ..., "samples": ...,
     "components": {"unet": {"architecture": ..., "parameters": ..., "shapes": ...}, "text_encoder": ...}}

The samples have the names that files have. The hashes of shapes are of names without component and `text_model`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import Weight, differences, fingerprint
from ..adapter.tokens import Tokens
from ..bases.pipeline import TEXT_LEVEL, PipelineModel, component_of
from ..errors import AdapterError
from .state import architecture_of, base_weights

_TOTALS = ("architecture", "parameters", "shapes")
_SAMPLED = ("samples", "rounding")


def base_fingerprint(model: nn.Module, changed: Collection[str]) -> dict[str, Any]:
    """Return the fingerprint of a base. `changed`: names of what an adapter changes, which tell a pipeline's
    components.
    """
    weights = base_weights(model)
    if not isinstance(model, PipelineModel):
        return fingerprint(weights, architecture_of(model))
    touched = {component_of(name) for name in changed}
    prints = {
        component: fingerprint(_without_level(_inside(weights, component)), architecture_of(live))
        for component, live in model.components.items()
        if component in touched
    }
    sampled: dict[str, dict[str, Any]] = {field: {} for field in _SAMPLED}
    for component, own in prints.items():
        full = {name.removeprefix(f"{TEXT_LEVEL}."): f"{component}.{name}" for name in _inside(weights, component)}
        for field in _SAMPLED:
            sampled[field] |= {full[name]: row for name, row in own.get(field, {}).items()}
    return {
        "architecture": " + ".join(own["architecture"] for own in prints.values()),
        "parameters": sum(own["parameters"] for own in prints.values()),
        "shapes": hashlib.sha256(repr([own["shapes"] for own in prints.values()]).encode()).hexdigest()[:16],
        "samples": sampled["samples"],
        **({"rounding": sampled["rounding"]} if sampled["rounding"] else {}),
        "components": {component: {field: own[field] for field in _TOTALS} for component, own in prints.items()},
    }


def check_base(model: nn.Module, adapter: Adapter, names: Mapping[str, str], force: bool) -> None:
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
    parts = expected.get("components") if isinstance(expected, Mapping) else None
    if not isinstance(parts, Mapping):
        lines = _compare_alone(model, weights, expected, {names.get(n, n) for n in (*adapter.updates, *adapter.saved)})
    else:
        touched = {component_of(n): component_of(names.get(n, n)) for n in (*adapter.updates, *adapter.saved)}
        lines = [
            line
            for component, live in touched.items()
            if component in parts and (live is None or live in model._modules)
            for line in _compare(model, weights, expected, component, live)
        ]
    if lines:
        raise AdapterError(
            "the adapter was trained on another base:\n  "
            + "\n  ".join(lines)
            + ("\n  load that base, or skip this check: attach(..., force=True); lorakit image generate: --force; export: --force-base")
        )


def _compare_alone(model: nn.Module, weights: Mapping[str, Weight], expected: Any, live: Collection[str]) -> list[str]:
    """Compare the fingerprint of a model by itself; in a pipeline, with the component that has its place."""
    if not isinstance(model, PipelineModel):
        return differences(expected, weights, architecture_of(model))
    lines = []
    for component in {component_of(name) for name in live} & model.components.keys():
        own, within = model.components[component], _inside(weights, component)
        lines += differences(
            expected, within if TEXT_LEVEL in own._modules else _without_level(within), architecture_of(own)
        )
    return lines


def _compare(
    model: nn.Module, weights: Mapping[str, Weight], expected: Mapping[str, Any], component: str, live: str | None
) -> list[str]:
    """Compare one component of a pipeline's fingerprint with its place in the model; `live` None: the model itself."""
    part = {**expected["components"][component]} if isinstance(expected["components"][component], Mapping) else {}
    for field in _SAMPLED:
        if isinstance(expected.get(field), Mapping):
            part[field] = _without_level(_inside(expected[field], component))
    module = model if live is None else getattr(model, "components", model._modules)[live]
    own = weights if live is None else _inside(weights, live)
    return differences(part, _without_level(own), architecture_of(module))


def _inside(named: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}


def _without_level(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{TEXT_LEVEL}."): value for name, value in named.items()}
