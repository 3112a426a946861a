"""bitsandbytes' nf4 and fp4 in checkpoint files. The codec is in `ops.quantized.blockwise`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.quantized import blockwise
from ...ops.quantized.blockwise import STATE, Blockwise
from .format import Format, Shapes, Tensors

# The quantization state is JSON with a float in it, whose length is not known beforehand: it is padded to this.
_STATE_BYTES = 256
_SCALE_ERRORS = "weight.absmax_errors"  # of opened tensors: what double quantization may have moved each scale by


class Bits4:
    """Each block's scale is the largest |W| in it, so it is computed again when a weight is quantized again."""

    kinds: ClassVar[tuple[str, ...]] = ("nf4", "fp4")
    title: ClassVar[str] = blockwise.TITLE
    marker: ClassVar[str] = "weight.absmax"
    main: ClassVar[str] = "weight"
    names: ClassVar[tuple[str, ...]] = ("weight",)

    def settings(self, config: Mapping[str, Any]) -> Blockwise | None:
        if not config.get("load_in_4bit", config.get("_load_in_4bit")):
            return None
        dtype = getattr(torch, str(config.get("bnb_4bit_compute_dtype")), None)
        return Blockwise(
            str(config.get("bnb_4bit_quant_type") or "fp4"),
            bool(config.get("bnb_4bit_use_double_quant")),
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        )

    def kind(self, settings: Blockwise) -> str:
        return settings.kind

    def new_settings(self, kind: str, like: Any, dtype: torch.dtype) -> Blockwise:
        return Blockwise(kind, double=False, dtype=getattr(like, "dtype", dtype))

    def takes(self, shape: tuple[int, int], settings: Blockwise) -> bool:
        """Rows must be whole blocks: else bitsandbytes' kernel for CPUs with AVX512 takes another block's scale."""
        return shape[1] % settings.blocksize == 0

    def config(self, settings: Blockwise, unquantized: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": settings.kind,
            "bnb_4bit_use_double_quant": settings.double,
            "bnb_4bit_compute_dtype": str(settings.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": unquantized,
        }

    def of_module(self, shapes: Shapes, small: Tensors, settings: Blockwise) -> tuple[Blockwise, tuple[int, int]]:
        state = blockwise.state_of(small)
        out, inner = state["shape"]
        dtype = getattr(torch, state["dtype"])
        return Blockwise(state["quant_type"], "nested_offset" in state, state["blocksize"], dtype), (out, inner)

    def step(self, shape: tuple[int, int], settings: Blockwise) -> int:
        return math.lcm(settings.blocksize, 2, shape[1]) // shape[1]

    def opened(self, tensors: Tensors) -> Tensors:
        """Return the tensors with scales in float32, since a cut need not begin where a block of 256 scales does."""
        state = blockwise.state_of(tensors)
        plain = {k: v for k, v in state.items() if not k.startswith("nested_")}
        return {
            "weight": tensors["weight"].reshape(-1).view(torch.uint8),
            "weight.absmax": blockwise.scales(tensors, state),
            **_scale_errors(tensors, state),
            "weight.quant_map": tensors["weight.quant_map"],
            STATE + state["quant_type"]: _state(plain),
        }

    def cut(self, tensors: Tensors, shape: tuple[int, int], start: int, stop: int, settings: Blockwise) -> Tensors:
        state, inner = blockwise.state_of(tensors), shape[1]
        first, last = start * inner, stop * inner
        blocks = slice(first // state["blocksize"], -(-last // state["blocksize"]))
        return {
            **tensors,
            "weight": tensors["weight"][first // 2 : -(-last // 2)],
            **{name: tensors[name][blocks] for name in ("weight.absmax", _SCALE_ERRORS) if name in tensors},
            STATE + state["quant_type"]: _state({**state, "shape": [stop - start, inner]}),
        }

    def dequantized(self, tensors: Tensors, settings: Blockwise) -> Tensor:
        return blockwise.dequantized(tensors)

    def errors(self, tensors: Tensors, W: Tensor, settings: Blockwise) -> Tensor:
        size = blockwise.state_of(tensors)["blocksize"]
        scales = {name: tensors[name] for name in ("weight.absmax", _SCALE_ERRORS) if name in tensors}
        own = {name: each.repeat_interleave(size)[: W.numel()].view(W.shape) for name, each in scales.items()}
        return blockwise.rounding(W, own["weight.absmax"], tensors["weight.quant_map"], own.get(_SCALE_ERRORS))

    def written(self, shape: tuple[int, int], settings: Blockwise, like: Shapes | None) -> Shapes:
        n = math.prod(shape)
        scales = -(-n // settings.blocksize)
        made = {
            "weight": like["weight"] if like is not None else ("U8", (-(-n // 2), 1)),
            "weight.absmax": ("U8" if settings.double else "F32", (scales,)),
            "weight.quant_map": ("F32", (16,)),
            STATE + settings.kind: ("U8", (_STATE_BYTES,)),
        }
        nested = {
            "weight.nested_absmax": ("F32", (-(-scales // blockwise.NESTED_BLOCK),)),
            "weight.nested_quant_map": ("F32", (256,)),
        }
        return made | (nested if settings.double else {})

    def quantized(
        self, blocks: Iterable[Tensor], shape: tuple[int, int], settings: Blockwise, like: Tensors | None
    ) -> dict[str, Tensor]:
        made = [blockwise.indexed(block, settings) for block in blocks]
        indices, absmax = (torch.cat(each) for each in zip(*made, strict=True))
        if like is not None:  # the bytes may be kept as another dtype (quant_storage)
            indices = indices.flatten().view(like["weight"].dtype).view(like["weight"].shape)
        return blockwise.packed_tensors(indices, absmax, shape, settings, _STATE_BYTES)


def _scale_errors(tensors: Tensors, state: Mapping[str, Any]) -> dict[str, Tensor]:
    if "nested_offset" not in state:
        return {}
    outer, code = tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]
    count = tensors["weight.absmax"].numel()
    return {_SCALE_ERRORS: blockwise.scale_rounding(outer, code, state["nested_blocksize"], count)}


def _state(state: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


FORMAT: Format = Bits4()
