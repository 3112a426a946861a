"""Linears with packed weights of a library that lorakit does not know: named, with what to do, rather than left out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import TargetError
from .bases import base_of

_FIX = (
    "  load the unquantized base, or one in a form that lorakit reads: bitsandbytes, torchao, quanto, HQQ, "
    "compressed-tensors, GPTQ, AWQ\n"
    "  (GPTQ and AWQ by lorakit.load_base, without kernel=: the kernels of libraries rearrange the weights)"
)


def is_unknown_linear(module: nn.Module) -> bool:
    """Whether a module looks like such a linear: it has sizes, and holds integers instead of a weight."""
    if isinstance(module, nn.Linear) or not all(
        isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features")
    ):
        return False
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    holds_codes = any(t.numel() > 1 and (not t.is_floating_point() or t.itemsize == 1) for t in tensors)
    return holds_codes and base_of(module).quantization is None


def check_known(name: str, module: nn.Module) -> None:
    """Raise TargetError for a target that is such a linear."""
    if is_unknown_linear(module):
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TargetError(f"'{name}' is a {cls}, a linear with packed weights that lorakit cannot read\n{_FIX}")


def check_all_known(names: Mapping[str, nn.Module]) -> None:
    """Raise TargetError if a model has such linears, which 'all-linear' would leave out. `names`: all its modules."""
    for name, module in names.items():
        try:
            check_known(name, module)
        except TargetError as error:
            raise TargetError(
                f"{error}\n  or name what is to be adapted without it (LoraConfig.targets, now 'all-linear')"
            ) from None
