"""The weight of q, k and v of an `nn.MultiheadAttention`: one parameter, `in_proj_weight` [3·dim, dim]."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from .base_weight import BaseWeight
from .dense import Dense


class InProjection(Dense):
    """An ordinary tensor under another name."""

    parameter: ClassVar[str] = "in_proj_weight"

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


KINDS: tuple[BaseWeight, ...] = (InProjection(),)
