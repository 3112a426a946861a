"""Weights quantized by bitsandbytes: NF4 and FP4 in blocks (Dettmers et al. 2023), int8 by rows (2022).

4 bits    W ≈ code[index] · absmax of the block of 64        code: 16 values in [-1, 1]; two indices per byte
          with double quantization: absmax ≈ code₂[index] · absmax₂ of 256 blocks + offset
8 bits    W ≈ index · absmax of the row / 127                index: int8 [out, in]
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...bases.int8_forward import hold, release
from ...errors import StateError
from ...ops.quantized import blockwise, int8
from .base_weight import MERGE, BaseWeight, QuantizedWeight

_REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' flag, see `FourBit.check`
_ORIGINAL = "_lora_repacks"  # marks a module whose flag was set


class FourBit(QuantizedWeight):
    """NF4 or FP4: a `Params4bit` of packed bytes, with its quantization state."""

    quantization: ClassVar[str | None] = blockwise.TITLE

    def owns(self, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        # Without a state it is not quantized yet. Of a pickled module it is a plain parameter, with the state.
        known = _is(weight, "Params4bit") or _is(module, "Linear4bit")
        return known and getattr(weight, "quant_state", None) is not None

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(_state(module).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return _state(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        return _weight(module).device

    def dense(self, module: nn.Module) -> Tensor:
        self.check(module, type(module).__name__, trainable=False)
        return _functional().dequantize_4bit(_weight(module).data, _state(module))

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        state, at = _state(module), at.to(self.device(module))
        values = self.dense(module).flatten()[at].float()
        block = at // state.blocksize
        absmax, errors = state.absmax, None
        if state.nested:
            inner = state.state2
            errors = blockwise.scale_rounding(inner.absmax, inner.code, inner.blocksize, absmax.numel())[block]
            absmax = _functional().dequantize_blockwise(absmax, inner) + state.offset
        return values, blockwise.rounding(values, absmax.flatten()[block].float(), state.code, errors)

    def was_transposed(self, module: nn.Module) -> bool:
        return _was_conv1d(module)

    def writable(self, module: nn.Module, name: str) -> Tensor:
        raise StateError(
            f"'{name}' is quantized ({self.quantization}): merging would round it to 16 values per block again, and "
            f"lose most of ΔW\n{MERGE}"
        )

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        """Raise StateError for a repacked weight. In the first evaluation on a CPU with AVX512-BF16, bitsandbytes
        repacks a weight permanently: absmax loses half of its digits, and the module passes no gradients on.
        """
        if getattr(_state(module), "packing_format_for_cpu", False):
            raise StateError(
                f"'{name}' was repacked by bitsandbytes when the model was evaluated, and no longer passes gradients\n"
                "  load the base again, and attach the adapter before calling the model"
            )

    def prepare(self, module: nn.Module) -> None:
        if getattr(module, _REPACKS, False):
            module.__dict__[_ORIGINAL] = True
            setattr(module, _REPACKS, False)

    def restore(self, module: nn.Module) -> None:
        if module.__dict__.pop(_ORIGINAL, False):
            setattr(module, _REPACKS, True)


class EightBit(QuantizedWeight):
    """LLM.int8(): an `Int8Params` of int8 with its rows' absmax, which bitsandbytes moves from the weight to the
    module's state in the first forward.
    """

    quantization: ClassVar[str | None] = int8.TITLE

    def owns(self, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        known = _is(weight, "Int8Params") or _is(module, "Linear8bitLt")  # the latter for a pickled module
        return known and weight is not None and weight.dtype == torch.int8

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(_weight(module).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float16  # the library quantizes from this

    def device(self, module: nn.Module) -> torch.device:
        return _weight(module).device

    def dense(self, module: nn.Module) -> Tensor:
        return _weight(module).data * self._steps(module)

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        weight, at = _weight(module), at.to(self.device(module))
        step = self._steps(module).flatten()[at // weight.shape[1]]
        values = weight.data.flatten()[at] * step
        return values, int8.rounding(values, step * 127)

    def was_transposed(self, module: nn.Module) -> bool:
        return _was_conv1d(module)

    def prepare(self, module: nn.Module) -> None:
        hold(module)  # else it computes something else in evaluation than in training

    def restore(self, module: nn.Module) -> None:
        release(module)

    def _steps(self, module: nn.Module) -> Tensor:
        """Return the distance between adjacent codes in each row: [out, 1], float32."""
        own = getattr(_weight(module), "SCB", None)
        state: Any = module.state
        absmax: Tensor = own if own is not None else state.SCB
        return absmax.float().view(-1, 1) / 127


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def _state(module: nn.Module) -> Any:
    return _weight(module).quant_state


def _is(value: Any, cls: str) -> bool:
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(value, getattr(library, cls, ()))


def _functional() -> Any:
    return sys.modules["bitsandbytes.functional"]


def _was_conv1d(module: nn.Module) -> bool:
    """Whether this linear was GPT-2's Conv1D: transformers quantizes its transposed weight, and records the class."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


KINDS: tuple[BaseWeight, ...] = (FourBit(), EightBit())
