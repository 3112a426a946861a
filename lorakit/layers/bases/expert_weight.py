"""A weight of experts: a parameter [E, out, in] of a module that has several (see `layers.expert_weight`)."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import StateError
from ..expert_weight import ExpertWeight
from .base_weight import BaseWeight
from .dense import Dense


class ExpertStack(Dense):
    """An ordinary parameter, which is not called `weight`."""

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, ExpertWeight)

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return ()  # the experts', not its own

    def writable(self, module: nn.Module, name: str) -> Tensor:
        assert isinstance(module, ExpertWeight)
        weight = module.weight
        if weight.is_meta:
            raise StateError(
                f"'{name}' is offloaded, so it cannot be merged here\n"
                "  merge the checkpoint's files instead: lorakit merge BASE ADAPTER OUT"
            )
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise StateError(
                f"'{name}' has a weight of {weight.dtype} (quantized?), which cannot be merged in place\n"
                "  merge into the unquantized base"
            )
        return weight


KINDS: tuple[BaseWeight, ...] = (ExpertStack(),)
