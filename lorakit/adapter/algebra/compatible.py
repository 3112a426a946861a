"""What adapters must agree on before they can be added: their base, their saved weights and their embeddings.

A saved weight (a new head, a trained bias) and a textual-inversion embedding replace the base's value, so two of them
have no sum. They are kept if all adapters that have one have the same, or replaced by their weighted mean on request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import AdapterError, listing
from ..adapter import Adapter
from ..checks import wide
from ..fingerprint import ONLY_ON, alike, components_in, is_sound

Saved = Literal["equal", "mean"]

# Components of diffusion pipelines and the pipelines that have them: none has both a UNet and a transformer.
_PIPELINES = {
    "unet.": {"a pipeline with a UNet"},
    "transformer.transformer_blocks": {"a pipeline with a transformer"},
    "transformer.single_transformer_blocks": {"a pipeline with a transformer"},
    "text_encoder": {"a pipeline with a UNet", "a pipeline with a transformer"},
}


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError if two adapters were trained on different bases, by their fingerprints; by their module names
    where one has none.
    """
    for (i, first), (j, second) in combinations(enumerate(adapters, start=1), 2):
        lines = base_differences(first, second)
        if lines:
            raise AdapterError(
                f"adapters {i} and {j} were trained on different bases:\n  "
                + "\n  ".join(lines)
                + "\n  force=True (--force-base) if you know better"
            )


def check_have_changes(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError for an update that changes nothing of its module, and so has no sum: virtual tokens."""
    for adapter in adapters:
        for module, update in adapter.updates.items():
            if not update.changes_weight and not update.changes_bias:
                update.factor_shapes(module)  # says why there are none


def needed_quantization(adapters: Sequence[Adapter]) -> str | None:
    """Return how the base must be quantized for the sum of adapters of which some repair what quantization lost
    (LoftQ); None if none does.

    Raises AdapterError for two that repair different quantizations: their sum is right on no base.
    """
    needing = [(i, a.metadata) for i, a in enumerate(adapters, start=1) if a.metadata.get(ONLY_ON)]
    for (i, first), (j, second) in combinations(needing, 2):
        kinds = [each[ONLY_ON] for each in (first, second)]
        if kinds[0] == kinds[1] and not _rounded_apart(first.get("fingerprint"), second.get("fingerprint")):
            continue
        how = f": {kinds[0]}, and {kinds[1]}" if kinds[0] != kinds[1] else f" ({kinds[0]}), to different values"
        raise AdapterError(
            f"adapters {i} and {j} repair what quantization lost (LoftQ) of bases that are quantized differently{how}\n"
            "  their sum is right on neither; combine adapters of one quantized base"
        )
    return str(needing[0][1][ONLY_ON]) if needing else None


def _rounded_apart(first: Any, second: Any) -> bool:
    """Whether two fingerprints' samples are known to differ without allowance for rounding."""
    if not is_sound(first) or not is_sound(second):
        return False
    exact = [{"samples": each["samples"]} for each in (first, second)]
    return any(not alike(exact[0], exact[1], name) for name in first["samples"].keys() & second["samples"].keys())


def base_differences(first: Adapter, second: Adapter) -> list[str]:
    """Return the differences between the bases of two adapters, one line each; empty if none are known."""
    prints = first.metadata.get("fingerprint"), second.metadata.get("fingerprint")
    if all(prints):
        return _unlike(*prints)
    ours, theirs = first.updates, second.updates
    stacks = _layer_stacks(ours), _layer_stacks(theirs)
    # Modules outside the numbered layers (an output layer, say) do not identify a model.
    if any(module in theirs for module in ours) or not all(stacks) or stacks[0] & stacks[1]:
        return []
    return [
        "they have no module and no stack of layers in common, and not both have a fingerprint to show that their base "
        "is the same",
        f"the first changes {listing(ours, 2)}",
        f"the second changes {listing(theirs, 2)}",
    ]


def _layer_stacks(modules: Iterable[str]) -> set[str]:
    """Return the stacks of numbered layers of these modules (`model.layers`), and the pipelines that have such
    components.
    """
    stacks = {found[1] for module in modules if (found := re.match(r"(.+?)\.\d+\.", module))}
    return stacks | {
        pipeline
        for stack in stacks
        for prefix, pipelines in _PIPELINES.items()
        if stack.startswith(prefix)
        for pipeline in pipelines
    }


def _unlike(first: Any, second: Any) -> list[str]:
    """Return the differences between two fingerprints, which come from files and may be damaged."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return ["a fingerprint is damaged"]
    # Of pipelines, what both change: one adapter may be of the UNet alone.
    parts = components_in(first), components_in(second)
    pairs = [(own, parts[1][name]) for name, own in parts[0].items() if name in parts[1]]
    lines = [
        f"{what}: {own.get(what)} and {other.get(what)}"
        for own, other in (pairs if any(parts) else [(first, second)])
        for what in ("architecture", "shapes")
        if own.get(what) != other.get(what)
    ]
    ours, theirs = first.get("samples"), second.get("samples")
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return [*lines, "a fingerprint is damaged"]
    for name in ours.keys() & theirs.keys():
        try:
            same = alike(first, second, name)
        except (TypeError, ValueError, AttributeError):
            return [*lines, "a fingerprint is damaged"]
        if not same:
            lines.append(f"weights: {name} holds other values")
    return lines


def combine_values(
    what: str, values: Sequence[Mapping[str, Tensor]], weights: Sequence[float], how: Saved
) -> dict[str, Tensor]:
    """Combine saved weights or embeddings: one value for each name. `values`: of each adapter, by name; `what`: what
    they are, for errors.

    Raises AdapterError listing the names whose values differ, unless `how` is "mean"; then if shapes differ or the
    weights do not have a positive sum.
    """
    names = dict.fromkeys(name for own in values for name in own)
    result, differing = {}, []
    for name in names:
        versions = [(w, own[name]) for w, own in zip(weights, values, strict=True) if name in own]
        first = versions[0][1]
        if all(v.shape == first.shape and torch.equal(v, first) for _, v in versions):
            result[name] = first
        elif how == "mean":
            result[name] = _mean(what, name, versions)
        else:
            differing.append(name)
    if differing:
        raise AdapterError(
            f"the adapters hold different values of {len(differing)} {what}s: {listing(differing)}\n"
            "  such a value replaces the base's, so two of them have no sum; saved='mean' (--saved mean) takes their "
            "weighted mean"
        )
    return result


def _mean(what: str, name: str, versions: Sequence[tuple[float, Tensor]]) -> Tensor:
    total = sum(w for w, _ in versions)
    shapes = [list(v.shape) for _, v in versions]
    if any(shape != shapes[0] for shape in shapes):
        raise AdapterError(f"{what} '{name}' has the shapes {listing(map(str, shapes))}: no mean of them")
    if total <= 0:
        raise AdapterError(
            f"{what} '{name}': the weights add up to {total:g}, so it has no weighted mean\n"
            "  give weights whose sum is positive"
        )
    return sum(((w / total) * wide(v) for w, v in versions), torch.zeros(())).to(versions[0][1].dtype)
