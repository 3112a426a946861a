"""Weights of GPTQ checkpoints (Frantar et al. 2022): see `ops.quantized.gptq`."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any, ClassVar

from ...bases.own_linear import FrozenQuantLinear, GptqLinear
from ...ops.quantized import gptq
from .base_weight import BaseWeight
from .packed_weight import PackedWeight


class Gptq(PackedWeight):
    """lorakit's `GptqLinear`, and gptqmodel's modules in plain torch and triton."""

    quantization: ClassVar[str | None] = gptq.TITLE
    codec: ClassVar[ModuleType] = gptq
    own: ClassVar[type[FrozenQuantLinear]] = GptqLinear
    classes: ClassVar[Collection[str]] = frozenset({"TorchLinear", "TorchAtenLinear", "TorchFusedLinear"})

    def owns(self, module: Any) -> bool:
        # "planar" is another layout, of the format gptq_p; its embeddings are a class derived from TorchLinear.
        return super().owns(module) and not getattr(module, "planar", False) and hasattr(module, "in_features")

    def settings(self, module: Any) -> gptq.Settings:
        stored = getattr(module, "qzero_format", None)
        plus_one = stored is None or stored() == 1  # gptqmodel turns the first format into the second while loading
        return gptq.Settings(module.bits, module.group_size, True, plus_one)


KINDS: tuple[BaseWeight, ...] = (Gptq(),)
