"""The format of AWQ checkpoints (Lin et al. 2023; the layout is "gemm" of the library AutoAWQ). Four bits.

W[o, i] = scales[g, o] · (q[i, o] − z[g, o])        g = i // group_size

qweight  int32 [in, out / 8]        eight outputs a word, in the order 0 2 4 6 1 3 5 7, lowest bits first
qzeros   int32 [groups, out / 8]    the same
scales   float [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ...errors import LorakitError
from . import gptq
from .int32 import pack

TITLE = "AWQ"  # what a base with such weights is said to be
BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies at each place of a word
NAMES = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Settings:
    """How a weight is quantized. `group_size`: inputs per scale, -1 for all."""

    group_size: int = 128

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read a model's `quantization_config`. Raises LorakitError for another layout, or another number of bits."""
        named = next((key for key in ("bits", "w_bit") if key in config), None)
        bits = BITS if named is None else gptq.whole(config, named)
        version = gptq.plain(config.get("version") or config.get("format") or "gemm").lower()
        if bits != BITS:
            raise LorakitError(f"AWQ weights of {bits} bits (quantization_config.bits)\n  expected 4")
        if version != "gemm":
            raise LorakitError(
                f"AWQ weights in the layout '{version}' (quantization_config.version), which is made for one kernel\n"
                "  expected gemm"
            )
        return cls(gptq.group_size(config, "group_size" if "group_size" in config else "q_group_size"))


def shapes(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[int, int]:
    """Return (in, out) of a packed weight. Raises LorakitError if its tensors do not fit together."""
    qweight = tensors["qweight"]
    size_in, size_out = qweight.shape[0], qweight.shape[1] * PER_WORD
    groups = -(-size_in // _group_size(settings, size_in))
    for name, expected in {"qzeros": (groups, size_out // PER_WORD), "scales": (groups, size_out)}.items():
        if tuple(tensors[name].shape) != expected:
            raise LorakitError(
                f"{name} is {list(tensors[name].shape)}, expected {list(expected)} beside a qweight of "
                f"{list(qweight.shape)} in groups of {settings.group_size}"
            )
    return size_in, size_out


def groups_of(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return the group of each input: [in], int64."""
    size_in = tensors["qweight"].shape[0]
    return torch.arange(size_in, device=tensors["qweight"].device) // _group_size(settings, size_in)


def dequantized(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return the weight [out, in], float32. Raises LorakitError if the tensors do not fit together."""
    shapes(tensors, settings)
    group = groups_of(tensors, settings)
    codes = unpacked(tensors["qweight"]).float()  # [in, out]
    codes -= unpacked(tensors["qzeros"]).float()[group]
    codes *= tensors["scales"].float()[group]
    return codes.T


def rounding(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return how far quantization may have moved each element: [out, in], float32.

    A step: AWQ clips the range of its groups, beyond which a weight is further off than half of one. How AWQ scales the
    inputs is not in it: by that, its weights are those of another base.
    """
    return tensors["scales"].float().abs()[groups_of(tensors, settings)].T


def quantized(W: Tensor, settings: Settings, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Round a weight [out, in] to the nearest codes. `dtype`: of the scales. Raises LorakitError if the outputs do not
    fill words of 32 bits.

    This is the format alone. AWQ's own method first scales each input channel by its activations, and the layer before
    by the inverse.
    """
    size_out, size_in = W.shape
    if size_out % PER_WORD:
        raise LorakitError(f"{size_out} outputs of 4 bits do not fill words of 32 bits")
    group = torch.arange(size_in, device=W.device) // _group_size(settings, size_in)
    by_input = W.detach().float().T
    scales, z = gptq.grid(by_input, group, gptq.Settings(BITS, settings.group_size, False, False), dtype)
    codes = (by_input / scales.float()[group] + z[group]).round().clamp(0, 2**BITS - 1)
    return {"qweight": packed(codes), "qzeros": packed(z), "scales": scales}


def _group_size(settings: Settings, size_in: int) -> int:
    return size_in if settings.group_size == -1 else settings.group_size


def packed(codes: Tensor) -> Tensor:
    """Pack codes [n, out] into words of eight outputs: [n, out / 8] int32."""
    ordered = codes.unflatten(1, (-1, PER_WORD))[:, :, list(ORDER)].flatten(1)
    return pack(ordered.T, BITS).T.contiguous()


def unpacked(words: Tensor) -> Tensor:
    """Return the codes in words of eight outputs [n, out / 8]: [n, out] uint8."""
    shifts = torch.tensor([BITS * ORDER.index(output) for output in range(PER_WORD)], dtype=torch.int32)
    codes = words.unsqueeze(2) >> shifts.to(words.device) & 2**BITS - 1
    return codes.to(torch.uint8).flatten(1)
