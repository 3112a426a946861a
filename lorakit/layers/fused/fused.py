"""Fuse modules of a model into one autograd node each (`adopt`), undo it (`release`), and report what is fused.

A fused module changes its class as an adapted linear does (see `swap`). The node replaces the forward of its own class
only in training and if gradients are needed. In all other cases (hooks on a child, several active adapters, autocast,
torch.compile), that forward is called. While B is zero, outputs equal the base's bit for bit either way.
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
from ..layer import LoraLayer, Swapped, adapted_class, mixin_and_base, rebind_hooked_forward
from ..linear import LinearLayer
from ..updates.update import LiveUpdate
from ..walk import base_modules
from . import attention, gated_mlp, rms_norm
from .gated_mlp import FusedGatedMlp
from .probe import Configs, outlives_its_module, settings
from .rms_norm import FusedRmsNorm

# module -> how it can be fused, the reason why it cannot (a string), or None if it does not resemble this kind
Match = Callable[[nn.Module], Any]
Kind = type[FusedRmsNorm] | type[FusedGatedMlp]
KINDS: dict[Kind, tuple[str, Match]] = {
    FusedRmsNorm: ("RMSNorm", rms_norm.match),
    FusedGatedMlp: ("gated MLP", gated_mlp.match),
}
ATTENTION, LINEAR = "attention's backward", "linear with its update"
_OWN_FORWARD = "the instance has its own forward, or an adapter trains it in full"
_ATTRIBUTES = ("lora_norm_variant", "lora_roles", "lora_act")

# The results of probes, by `_probe_key`. A probe takes about 10 ms, and equal modules need only one.
_probed: dict[tuple, dict[Kind, Any]] = {}
MAX_PROBED = 1000  # the entries reference classes, and some programs create classes without end


class _ProbeResults(NamedTuple):
    """Results for one model: how modules can be fused, by `_probe_key`; and its configs."""

    matches: dict[tuple, dict[Kind, Any]]
    configs: Configs


class Fused(NamedTuple):
    """The number of modules of one class that are fused, or that are not, and why."""

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
    """Fuse every module that can be, unless an adapter trains it, or a part of it, in full."""
    results = _ProbeResults({}, {})
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for _, module in base_modules(model):
            if isinstance(module, Swapped) or "forward" in module.__dict__:
                continue
            fitting = ((kind, match) for kind, match in _match(module, results).items() if not isinstance(match, str))
            for kind, match in itertools.islice(fitting, 1):
                module.__dict__.update(kind.lora_settings(module, match))
                module.__class__ = adapted_class(kind, type(module))


def release(model: nn.Module) -> None:
    """Restore every fused module's own class."""
    for _, module in base_modules(model):
        if type(module).__bases__[0] in KINDS:
            module.__class__ = mixin_and_base(type(module))[1]
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
            rebind_hooked_forward(module)


def report(model: nn.Module) -> list[Fused]:
    """Report what is fused in a model with adapters, and why the rest is not."""
    counts: Counter[tuple[str, str, str | None]] = Counter()
    results = _ProbeResults({}, {})
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for _, module in base_modules(model):
            cls = type(module)
            if cls.__bases__[0] in KINDS:
                if _applicable(module):  # otherwise nothing in it is adapted any more
                    counts[KINDS[cls.__bases__[0]][0], mixin_and_base(cls)[1].__name__, None] += 1
            elif isinstance(module, LinearLayer):
                counts[LINEAR, mixin_and_base(cls)[1].__name__, _why_not_linear(module)] += 1
            elif not isinstance(module, LoraLayer):
                for kind, match in _match(module, results).items():
                    counts[KINDS[kind][0], cls.__name__, match if isinstance(match, str) else _OWN_FORWARD] += 1
    rows = [Fused(kind, cls, count, why) for (kind, cls, why), count in counts.items()]
    if hasattr(model, "set_attn_implementation"):
        used, why = attention.is_used(model), attention.why_not(model)
        if used or why is not None:
            rows.append(Fused(ATTENTION, "", 1, why))
    return rows


def _match(module: nn.Module, results: _ProbeResults) -> dict[Kind, Any]:
    """Return, for each kind that the module resembles, how it can be fused, or why it cannot."""
    if not _applicable(module):
        return {}
    key = _probe_key(module, results.configs)
    matches = results.matches.get(key, _probed.get(key))
    if matches is None:
        matches = {kind: fit for kind, (_, match) in KINDS.items() if (fit := match(module)) is not None}
        if outlives_its_module(key) and len(_probed) < MAX_PROBED:
            _probed[key] = matches
    results.matches[key] = matches
    return matches


def _applicable(module: nn.Module) -> bool:
    """Whether a module has no children (a norm), or has adapted linears."""
    return not module._modules or any(isinstance(child, LoraLayer) for child in module._modules.values())


def _probe_key(module: nn.Module, configs: Configs) -> tuple:
    """Return a key that is equal for modules of one class and config, which need only one probe."""
    children = tuple(
        (name, type(child), type(child).forward, _shapes(child), settings(child, configs))
        for name, child in module._modules.items()
        if child is not None
    )
    return type(module), type(module).forward, settings(module, configs), children, _shapes(module)


def _shapes(module: nn.Module) -> tuple:
    return tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())


def _why_not_linear(layer: LinearLayer) -> str | None:
    quantization = base_of(layer).quantization
    if quantization is not None:
        return f"its weight is quantized ({quantization})"
    if not layer.lora_plain:
        base = mixin_and_base(type(layer))[1].__name__
        return (
            "it packs several projections" if hasattr(layer, "lora_parts") else f"{base} does not compute just x Wᵀ + b"
        )
    if plain_weight(layer) is None:
        return "its weight is trained, quantized, sharded or computed"
    children = layer._modules.values()
    return (
        None
        if any(isinstance(child, LiveUpdate) and child.width for child in children)
        else "its update is not a pair of matrices"
    )
