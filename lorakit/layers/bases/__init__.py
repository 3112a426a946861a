"""Ways of storing a base's weight (see `base_weight`): a file per library or format, which says what it owns."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor, nn

from ...adapter.fingerprint import Quantized
from ..walk import base_modules
from .base_weight import BaseWeight

_LAST = "dense"


def base_of(module: nn.Module) -> BaseWeight:
    """Return the way in which this module's weight is stored."""
    return next(kind for kind in _kinds() if kind.owns(module))


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a quantized weight, by name."""
    kinds = [kind for kind in _kinds() if kind.quantization is not None]
    return {name: module for name, module in base_modules(model) if any(kind.owns(module) for kind in kinds)}


def fingerprinted(module: nn.Module) -> Quantized:
    """Describe a quantized weight for a fingerprint: in the shape and order of the weight before quantization."""
    base = base_of(module)
    shape, is_meta = base.shape(module), base.device(module).type == "meta"
    if not base.was_transposed(module):
        return Quantized(shape, lambda at: base.sample(module, at), is_meta)
    rows, columns = shape

    def sample_transposed(at: Tensor) -> tuple[Tensor, Tensor]:
        return base.sample(module, at % rows * columns + at // rows)

    return Quantized((columns, rows), sample_transposed, is_meta)


def parameter_count(model: nn.Module) -> int:
    """Count a model's parameters, including adapters'; a quantized weight counts as its dense one."""
    packed: dict[int, int] = {}  # a shared weight counts once
    for module in quantized(model).values():
        base, bias = base_of(module), bias_of(module)
        held = [id(p) for name in base.stored(module) if (p := module._parameters.get(name)) is not None]
        packed |= dict.fromkeys(held, 0) | {held[0] if held else id(module): math.prod(base.shape(module))}
        packed |= {} if bias is None else {id(bias): bias.numel()}
    others = {id(p): p.numel() for p in model.parameters()}
    return sum((others | packed).values())


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a quantized linear's bias: a parameter, or in some libraries a buffer or an attribute."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


@cache
def _kinds() -> tuple[BaseWeight, ...]:
    """Load the objects of all files. Dense is last: it owns what no other does."""
    names = {file.name for file in iter_modules(__path__)}
    files = [import_module(f".{name}", __name__) for name in sorted(names, key=lambda name: name == _LAST)]
    return tuple(kind for file in files for kind in getattr(file, "KINDS", ()))
