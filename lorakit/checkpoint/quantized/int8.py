"""bitsandbytes' LLM.int8() in checkpoint files. The codec is in `ops.quantized.int8`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import LorakitError
from ...ops.quantized import int8
from .format import Format, Shapes, Tensors


class Int8:
    """Each output's scale is its largest |W|, so it is computed again when a weight is quantized again."""

    kinds: ClassVar[tuple[str, ...]] = ("int8",)
    title: ClassVar[str] = int8.TITLE
    marker: ClassVar[str] = "SCB"
    main: ClassVar[str] = "weight"
    names: ClassVar[tuple[str, ...]] = ("weight", "SCB")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {} if config.get("load_in_8bit", config.get("_load_in_8bit")) else None

    def kind(self, settings: Any) -> str:
        return "int8"

    def new_settings(self, kind: str, like: Any, dtype: torch.dtype) -> dict[str, Any]:
        return {}

    def takes(self, shape: tuple[int, int], settings: Any) -> bool:
        return True

    def config(self, settings: Any, unquantized: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": unquantized,
        }

    def of_module(self, shapes: Shapes, small: Tensors, settings: Any) -> tuple[Any, tuple[int, int]]:
        dtype, shape = shapes["weight"]
        if dtype != "I8" or len(shape) != 2 or shapes["SCB"][1] != shape[:1]:
            raise LorakitError(
                f"its weight is {dtype} {list(shape)} with scales (SCB) {list(shapes['SCB'][1])}; expected I8 [out, "
                "in] and a scale for each output"
            )
        return settings, (shape[0], shape[1])

    def step(self, shape: tuple[int, int], settings: Any) -> int:
        return 1

    def opened(self, tensors: Tensors) -> Tensors:
        return tensors

    def cut(self, tensors: Tensors, shape: tuple[int, int], start: int, stop: int, settings: Any) -> Tensors:
        return {name: tensors[name][start:stop] for name in ("weight", "SCB")}

    def dequantized(self, tensors: Tensors, settings: Any) -> Tensor:
        return int8.dequantized(tensors)

    def errors(self, tensors: Tensors, W: Tensor, settings: Any) -> Tensor:
        return int8.rounding(W, tensors["SCB"].view(-1, 1))

    def written(self, shape: tuple[int, int], settings: Any, like: Shapes | None) -> Shapes:
        return {"weight": ("I8", shape), "SCB": ("F32", shape[:1]), "weight_format": ("U8", ())}

    def quantized(
        self, blocks: Iterable[Tensor], shape: tuple[int, int], settings: Any, like: Tensors | None
    ) -> dict[str, Tensor]:
        made = [int8.quantized(block) for block in blocks]
        return {**made[0], **{name: torch.cat([each[name] for each in made]) for name in ("weight", "SCB")}}


FORMAT: Format = Int8()
