"""LLM.int8(): eight bits per weight, with a scale for each output (Dettmers et al. 2022), as bitsandbytes stores it.

    W ≈ index · absmax of the row / 127

Tensors of a module [out, in]:

    weight           int8 [out, in]    index, rounded to nearest
    SCB              float32 [out]     absmax
    weight_format    uint8 []          0: by rows, the only layout that is still written
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LorakitError

TITLE = "bitsandbytes, 8 bits"  # what a base with such weights is said to be
_STEP = 7.874015718698502e-3  # the float32 nearest to 1 / 127, as bitsandbytes has it


def dequantized(tensors: Mapping[str, Tensor], settings: None = None) -> Tensor:
    """Return W [out, in] in float32. Raises LorakitError for tensors that do not belong together."""
    weight, absmax = tensors["weight"], tensors["SCB"]
    if weight.dtype != torch.int8 or weight.ndim != 2 or absmax.numel() != weight.shape[0]:
        raise LorakitError(
            f"an int8 weight of {list(weight.shape)} ({weight.dtype}) has {absmax.numel()} scales; expected int8 [out, "
            "in] and a scale for each output"
        )
    return weight * absmax.float().view(-1, 1) * _STEP


def rounding(values: Tensor, absmax: Tensor) -> Tensor:
    """Return how far quantization may have moved elements: half a step, and what rounding to float16 changed before.

    values: dequantized elements; absmax: of their rows, of a shape that broadcasts with theirs.
    """
    return absmax.float() / 254 + values.float().abs() * 2**-11


def quantized(W: Tensor, settings: None = None) -> dict[str, Tensor]:
    """Quantize W [out, in]; like bitsandbytes, it is rounded to float16 first.

    Raises LorakitError for a weight that is not finite or too large for float16.
    """
    half = W.detach().half()
    absmax = half.abs().amax(1).float()
    if not bool(absmax.isfinite().all()):
        raise LorakitError("the weight has NaN or infinite elements, or some above 65,504, which int8 cannot store")
    steps = torch.where(absmax > 0, 127.0 / absmax, 0.0)  # bitsandbytes divides by zero in a row of zeros
    index = torch.round(half * steps.unsqueeze(1)).to(torch.int8)
    return {"weight": index, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
