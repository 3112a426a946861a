"""How a base's weight is stored (see `base_weight`): a file for each library, found by asking all of them."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor, nn

from ...adapter.fingerprint import Quantized
from ..walk import base_modules
from .base_weight import BaseWeight

_PROTOCOL, _LAST = "base_weight", "dense"


def base_of(module: nn.Module) -> BaseWeight:
    """How this module's weight is stored."""
    return next(kind for kind in _kinds() if kind.owns(module))


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a quantized weight, by their names."""
    kinds = [kind for kind in _kinds() if kind.quantization is not None]
    return {name: module for name, module in base_modules(model) if any(kind.owns(module) for kind in kinds)}


def fingerprinted(module: nn.Module) -> Quantized:
    """A quantized weight as a base's fingerprint takes it: in the shape and order of the weight that was quantized."""
    base = base_of(module)
    shape, is_meta = base.shape(module), base.device(module).type == "meta"
    if not base.is_turned(module):
        return Quantized(shape, lambda at: base.sample(module, at), is_meta)
    rows, columns = shape

    def turned(at: Tensor) -> tuple[Tensor, Tensor]:
        return base.sample(module, at % rows * columns + at // rows)

    return Quantized((columns, rows), turned, is_meta)


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has, adapters' included; of a quantized weight the dense one's elements count."""
    packed = {id(m._parameters["weight"]): math.prod(base_of(m).shape(m)) for m in quantized(model).values()}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


@cache
def _kinds() -> tuple[BaseWeight, ...]:
    """Those of every file. Dense is asked last: it owns what no other does."""
    names = {file.name for file in iter_modules(__path__)} - {_PROTOCOL}
    files = [import_module(f".{name}", __name__) for name in sorted(names, key=lambda name: name == _LAST)]
    return tuple(kind for file in files for kind in file.KINDS)
