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


def is_unknown_linear(module: nn.Module) -> bool:
    """Whether a module looks like a linear with packed weights of a library that lorakit does not know: it has sizes,
    and holds integers instead of a weight.
    """
    if base_of(module).quantization is not None or isinstance(module, nn.Linear):
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return all(isinstance(size, int) for size in sizes) and any(
        t.numel() > 1 and (not t.is_floating_point() or t.itemsize == 1) for t in tensors
    )


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
        base = base_of(module)
        held = [id(p) for name in base.stored(module) if (p := module._parameters.get(name)) is not None]
        packed |= dict.fromkeys(held, 0) | {held[0] if held else id(module): math.prod(base.shape(module))}
    others = {id(p): p.numel() for p in model.parameters()}
    return sum((others | packed).values())


@cache
def _kinds() -> tuple[BaseWeight, ...]:
    """Load the objects of all files. Dense is last: it owns what no other does."""
    names = {file.name for file in iter_modules(__path__)}
    files = [import_module(f".{name}", __name__) for name in sorted(names, key=lambda name: name == _LAST)]
    return tuple(kind for file in files for kind in getattr(file, "KINDS", ()))
