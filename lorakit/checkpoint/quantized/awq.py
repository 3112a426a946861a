"""AWQ in checkpoint files. The codec is in `ops.quantized.awq`.

AWQ itself scales the inputs' channels with data before it rounds. Here a weight is rounded to the nearest codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.quantized import awq
from ...ops.quantized.awq import PER_WORD, Settings
from .format import Format, Shapes, Tensors, on_meta
from .gptq import nonzero


class Awq:
    """A weight that is quantized again keeps its groups, scales and zero points."""

    kinds: ClassVar[tuple[str, ...]] = ("awq",)
    title: ClassVar[str] = awq.TITLE
    marker: ClassVar[str] = "qweight"
    main: ClassVar[str] = "qweight"
    names: ClassVar[tuple[str, ...]] = awq.NAMES

    def settings(self, config: Mapping[str, Any]) -> Settings | None:
        return Settings.of(config) if config.get("quant_method") == "awq" else None

    def kind(self, settings: Settings) -> str:
        return "awq"

    def new_settings(self, kind: str, like: Any, dtype: torch.dtype) -> Settings:
        return Settings(getattr(like, "group_size", 128))

    def takes(self, shape: tuple[int, int], settings: Any) -> bool:
        return True

    def config(self, settings: Settings, unquantized: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": awq.BITS,
            "group_size": settings.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": unquantized,
        }

    def of_module(self, shapes: Shapes, small: Tensors, settings: Settings) -> tuple[Settings, tuple[int, int]]:
        inner, out = awq.shapes(on_meta(shapes), settings)
        return settings, (out, inner)

    def step(self, shape: tuple[int, int], settings: Settings) -> int:
        return PER_WORD

    def opened(self, tensors: Tensors) -> Tensors:
        return tensors

    def cut(self, tensors: Tensors, shape: tuple[int, int], start: int, stop: int, settings: Settings) -> Tensors:
        words = slice(start // PER_WORD, stop // PER_WORD)
        return {
            "qweight": tensors["qweight"][:, words],
            "qzeros": tensors["qzeros"][:, words],
            "scales": tensors["scales"][:, start:stop],
        }

    def dequantized(self, tensors: Tensors, settings: Settings) -> Tensor:
        return awq.dequantized(tensors, settings)

    def errors(self, tensors: Tensors, W: Tensor, settings: Settings) -> Tensor:
        return awq.rounding(tensors, settings)

    def written(self, shape: tuple[int, int], settings: Settings, like: Shapes | None) -> Shapes:
        out, inner = shape
        groups = 1 if settings.group_size == -1 else -(-inner // settings.group_size)
        return like or {
            "qweight": ("I32", (inner, out // PER_WORD)),
            "qzeros": ("I32", (groups, out // PER_WORD)),
            "scales": ("F16", (groups, out)),
        }

    def quantized(
        self, blocks: Iterable[Tensor], shape: tuple[int, int], settings: Settings, like: Tensors | None
    ) -> dict[str, Tensor]:
        if like is None:
            made = [awq.quantized(block, settings) for block in blocks]
            return {name: torch.cat([each[name] for each in made], 1) for name in awq.NAMES}
        codes, start = [], 0
        for block in blocks:
            own = self.cut(like, shape, start, start + len(block), settings)
            group, z = awq.groups_of(own, settings), awq.unpacked(own["qzeros"]).float()
            places = block.float().T / nonzero(own["scales"].float())[group] + z[group]
            codes.append(awq.packed(places.round().clamp(0, 2**awq.BITS - 1)))
            start += len(block)
        return {**like, "qweight": torch.cat(codes, 1)}


FORMAT: Format = Awq()
