"""Weights of AWQ checkpoints (Lin et al. 2023): see `ops.quantized.awq`.

AWQ multiplies the weight's input channels by factors, and divides what comes before by them, before it rounds. So a
checkpoint's weights are those of another base than the one it was made from: an adapter of the one does not go onto the
other, and the fingerprint says so.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any, ClassVar

from ...bases.own_linear import AwqLinear, FrozenQuantLinear
from ...ops.quantized import awq
from .base_weight import BaseWeight
from .packed_weight import PackedWeight


class Awq(PackedWeight):
    """lorakit's `AwqLinear`, gptqmodel's modules in plain torch, and AutoAWQ's."""

    quantization: ClassVar[str | None] = awq.TITLE
    codec: ClassVar[ModuleType] = awq
    own: ClassVar[type[FrozenQuantLinear]] = AwqLinear
    classes: ClassVar[Collection[str]] = frozenset(
        {"AwqTorchLinear", "TorchAtenAwqLinear", "TorchFusedAwqLinear", "WQLinear_GEMM"}
    )

    def settings(self, module: Any) -> awq.Settings:
        return awq.Settings(module.group_size)


KINDS: tuple[BaseWeight, ...] = (Awq(),)
