"""GPTQ in checkpoint files. The codec is in `ops.quantized.gptq`.

GPTQ itself chooses codes with data, to keep a layer's outputs. Here a weight is rounded to the nearest codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import LorakitError
from ...ops.quantized import gptq
from ...ops.quantized.gptq import Settings
from ...ops.quantized.int32 import WORD, pack
from .format import Format, Shapes, Tensors, on_meta

_BY_OUTPUT = ("qweight", "qzeros", "scales")  # their last axis runs over the outputs


class Gptq:
    """A weight that is quantized again keeps its groups, scales and zero points."""

    kinds: ClassVar[tuple[str, ...]] = ("gptq",)
    title: ClassVar[str] = gptq.TITLE
    marker: ClassVar[str] = "qweight"
    main: ClassVar[str] = "qweight"
    names: ClassVar[tuple[str, ...]] = gptq.NAMES

    def settings(self, config: Mapping[str, Any]) -> Settings | None:
        return Settings.of(config) if config.get("quant_method") == "gptq" else None

    def kind(self, settings: Settings) -> str:
        return "gptq"

    def new_settings(self, kind: str, like: Any, dtype: torch.dtype) -> Settings:
        return Settings(group_size=getattr(like, "group_size", 128))

    def takes(self, shape: tuple[int, int], settings: Any) -> bool:
        return True

    def config(self, settings: Settings, unquantized: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": settings.bits,
            "group_size": settings.group_size,
            "sym": settings.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if settings.plus_one else "gptq_v2",
            "modules_to_not_convert": unquantized,
        }

    def of_module(self, shapes: Shapes, small: Tensors, settings: Settings) -> tuple[Settings, tuple[int, int]]:
        """A checkpoint may have modules of other bits and groups than its config says (`dynamic`)."""
        (words, out), (groups, zeros) = shapes["qweight"][1], shapes["qzeros"][1]
        bits = zeros * WORD // max(out, 1)
        if bits not in gptq.BITS:
            raise LorakitError(f"its qzeros have {zeros} columns for {out} outputs: {bits} bits; expected 2, 3, 4 or 8")
        inner = words * WORD // bits
        size = settings.group_size if settings.group_size > 0 else inner
        if math.ceil(inner / size) != groups:
            size = math.ceil(inner / groups)
        own = replace(settings, bits=bits, group_size=size)
        gptq.shapes(on_meta(shapes), own)
        return own, (out, inner)

    def step(self, shape: tuple[int, int], settings: Settings) -> int:
        return WORD if settings.bits == 3 else WORD // settings.bits

    def opened(self, tensors: Tensors) -> Tensors:
        return tensors

    def cut(self, tensors: Tensors, shape: tuple[int, int], start: int, stop: int, settings: Settings) -> Tensors:
        return {**tensors, **{n: _columns(tensors[n], shape[0], start, stop) for n in _BY_OUTPUT}}

    def dequantized(self, tensors: Tensors, settings: Settings) -> Tensor:
        return gptq.dequantized(tensors, settings)

    def errors(self, tensors: Tensors, W: Tensor, settings: Settings) -> Tensor:
        return gptq.rounding(tensors, settings)

    def written(self, shape: tuple[int, int], settings: Settings, like: Shapes | None) -> Shapes:
        out, inner = shape
        groups = 1 if settings.group_size == -1 else -(-inner // settings.group_size)
        return like or {
            "qweight": ("I32", (inner * settings.bits // WORD, out)),
            "qzeros": ("I32", (groups, out * settings.bits // WORD)),
            "scales": ("F16", (groups, out)),
            "g_idx": ("I32", (inner,)),
        }

    def quantized(
        self, blocks: Iterable[Tensor], shape: tuple[int, int], settings: Settings, like: Tensors | None
    ) -> dict[str, Tensor]:
        if like is None:
            made = [gptq.quantized(block, settings) for block in blocks]
            joined = {name: torch.cat([each[name] for each in made], 1) for name in _BY_OUTPUT}
            return {**joined, "g_idx": made[0]["g_idx"]}
        codes, start = [], 0
        for block in blocks:
            own = self.cut(like, shape, start, start + len(block), settings)
            group, z = gptq.groups_of(own, settings), gptq.zeros(own, settings).float()
            places = block.float().T / nonzero(own["scales"].float())[group] + z[group]
            codes.append(pack(places.round().clamp(0, 2**settings.bits - 1), settings.bits))
            start += len(block)
        return {**like, "qweight": torch.cat(codes, 1)}


def nonzero(scales: Tensor) -> Tensor:
    """Return scales with 1 in place of 0, which some files have for groups of zeros."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _columns(tensor: Tensor, out: int, start: int, stop: int) -> Tensor:
    """Return the columns of outputs `start` to `stop` of a tensor whose columns hold several outputs each, or one."""
    return tensor[:, start * tensor.shape[1] // out : stop * tensor.shape[1] // out]


FORMAT: Format = Gptq()
