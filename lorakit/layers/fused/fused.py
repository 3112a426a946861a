"""Which modules of a model are computed as one node: give them their class (`adopt`), take it back (`release`), and
report which are fused.

A fused module gets its class as an adapted linear does (see `swap`). It stands in for its own class's forward only in
training and where gradients are made; whatever else is the case (hooks on a child, several active adapters, autocast,
torch.compile), that forward is called. While B is zero, values have the base's bits either way.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..bases import base_of
from ..frozen import plain_weight
from ..layer import LoraLayer, Swapped, adapted_class, mixin_and_base
from ..linear import LinearLayer
from ..swap import rebind_hooked_forward
from ..updates.update import LiveUpdate
from ..walk import base_modules
from . import attention, gated_mlp, rms_norm
from .gated_mlp import FusedGatedMlp
from .probe import Configs, outlives_its_module, settings
from .rms_norm import FusedRmsNorm

Match = Callable[[nn.Module], Any]  # what was found, or why the module cannot be fused, or None
Kind = type[FusedRmsNorm] | type[FusedGatedMlp]
KINDS: dict[Kind, tuple[str, Match]] = {
    FusedRmsNorm: ("RMSNorm", rms_norm.match),
    FusedGatedMlp: ("gated MLP", gated_mlp.match),
}
ATTENTION, LINEAR = "attention's backward", "linear with its update"
_OWN_FORWARD = "the instance has a forward of its own, or an adapter trains it whole"
_OWN = ("lora_form", "lora_roles", "lora_act")

# A probe takes some 10 ms; the next model with such modules, or the next attach to this one, need none. By `_like`.
_probed: dict[tuple, dict[Kind, Any]] = {}
MOST_PROBED = 1000  # entries hold classes, and some programs make classes without end


class _Seen(NamedTuple):
    """What is known of one model's modules: by `_like` what they can be fused as; and its configs."""

    matches: dict[tuple, dict[Kind, Any]]
    configs: Configs


class Fused(NamedTuple):
    """How many modules of one class are fused, or why they are not."""

    kind: str
    cls: str
    modules: int
    why_not: str | None

    def __str__(self) -> str:
        what = f"{self.kind} of {self.cls}" if self.cls else self.kind
        return (
            f"{what}: {self.modules} fused"
            if self.why_not is None
            else f"{what} is not fused ({self.modules}): {self.why_not}"
        )


def adopt(model: nn.Module) -> None:
    """Give every module that can be fused, and is or holds nothing that an adapter trains whole, its class."""
    seen = _Seen({}, {})
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for _, module in base_modules(model):
            if isinstance(module, Swapped) or "forward" in module.__dict__:
                continue
            fitting = ((kind, found) for kind, found in _match(module, seen).items() if not isinstance(found, str))
            for kind, found in itertools.islice(fitting, 1):
                module.__dict__.update(kind.lora_settings(module, found))
                module.__class__ = adapted_class(kind, type(module))


def release(model: nn.Module) -> None:
    """Give every fused module its own class back."""
    for _, module in base_modules(model):
        if type(module).__bases__[0] in KINDS:
            module.__class__ = mixin_and_base(type(module))[1]
            for name in _OWN:
                module.__dict__.pop(name, None)
            rebind_hooked_forward(module)


def report(model: nn.Module) -> list[Fused]:
    """What of a model with adapters is fused, and why the rest is not."""
    counts: Counter[tuple[str, str, str | None]] = Counter()
    seen = _Seen({}, {})
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for _, module in base_modules(model):
            cls = type(module)
            if cls.__bases__[0] in KINDS:
                if _applicable(module):  # else nothing in it is adapted any more
                    counts[KINDS[cls.__bases__[0]][0], mixin_and_base(cls)[1].__name__, None] += 1
            elif isinstance(module, LinearLayer):
                counts[LINEAR, mixin_and_base(cls)[1].__name__, _why_not_linear(module)] += 1
            elif not isinstance(module, LoraLayer):
                for kind, found in _match(module, seen).items():
                    counts[KINDS[kind][0], cls.__name__, found if isinstance(found, str) else _OWN_FORWARD] += 1
    rows = [Fused(kind, cls, count, why) for (kind, cls, why), count in counts.items()]
    if hasattr(model, "set_attn_implementation"):
        used, why = attention.is_used(model), attention.why_not(model)
        if used or why is not None:
            rows.append(Fused(ATTENTION, "", 1, why))
    return rows


def _match(module: nn.Module, seen: _Seen) -> dict[Kind, Any]:
    """What was found, or why the module cannot be fused, for each kind that it looks like."""
    if not _applicable(module):
        return {}
    key = _like(module, seen.configs)
    found = seen.matches.get(key, _probed.get(key))
    if found is None:
        found = {kind: fit for kind, (_, match) in KINDS.items() if (fit := match(module)) is not None}
        if outlives_its_module(key) and len(_probed) < MOST_PROBED:
            _probed[key] = found
    seen.matches[key] = found
    return found


def _applicable(module: nn.Module) -> bool:
    """A module that has no children (a norm), or holds adapted linears."""
    return not module._modules or any(isinstance(child, LoraLayer) for child in module._modules.values())


def _like(module: nn.Module, configs: Configs) -> tuple:
    """Equal for modules of one class and config: what a probe of one says goes for the other."""
    children = tuple(
        (name, type(child), type(child).forward, _shapes(child), settings(child, configs))
        for name, child in module._modules.items()
        if child is not None
    )
    return type(module), type(module).forward, settings(module, configs), children, _shapes(module)


def _shapes(module: nn.Module) -> tuple:
    return tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())


def _why_not_linear(layer: LinearLayer) -> str | None:
    how = base_of(layer).quantization
    if how is not None:
        return f"its weight is quantized ({how})"
    if not layer.lora_plain:
        base = mixin_and_base(type(layer))[1].__name__
        return (
            "several projections in one" if hasattr(layer, "lora_parts") else f"{base} does not compute just x Wᵀ + b"
        )
    if plain_weight(layer) is None:
        return "its weight is trained, quantized, sharded or computed"
    children = layer._modules.values()
    return (
        None
        if any(isinstance(child, LiveUpdate) and child.width for child in children)
        else "its update is no pair of matrices"
    )
