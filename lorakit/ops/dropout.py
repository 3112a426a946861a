"""Dropout whose mask is made again in backward from a seed, so that nothing is kept.

    dropped(x)[i] = x[i] with probability 1 - p, else 0        (not divided by 1 - p: that goes into LoRA's scale)

On a CPU the mask comes from numpy's SFC64, 15 bits a number: with applying it a quarter of the time of torch's dropout, which draws
from a slower generator and keeps the mask.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STEPS = 1 << 15  # p is rounded to a multiple of 1 / STEPS


def draw_seed() -> int:
    """A seed from torch's own generator: `torch.manual_seed` governs it, and gradient checkpointing draws it again."""
    return int(torch.randint(1 << 62, ()))


def kept_share(p: float) -> float:
    """The exact probability with which a number is kept."""
    return 1 - _dropped_steps(p) / STEPS


def keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Which numbers of x are kept, for `masked`: on a CPU int16, -1 (kept) or 0; elsewhere 1 or 0 in x's dtype."""
    if x.device.type != "cpu" or type(x) is not Tensor:  # elsewhere, and for planning with fake tensors
        generator = torch.Generator(x.device if x.device.type != "meta" else "cpu").manual_seed(seed)
        return torch.empty_like(x).bernoulli_(kept_share(p), generator=generator)
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
    bits &= STEPS - 1
    bits -= _dropped_steps(p)  # negative: dropped
    bits >>= 15
    np.invert(bits, out=bits)
    return torch.from_numpy(bits).view(x.shape)


def _dropped_steps(p: float) -> int:
    return min(round(p * STEPS), STEPS - 1)  # something is always kept, for the scale divides by its share


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with what is not kept set to zero; a new tensor."""
    if mask.dtype != torch.int16:
        return x * mask
    if x.element_size() == 2:
        return (x.view(torch.int16) & mask).view(x.dtype)  # all bits of a number or none
    if x.element_size() == 4:
        return (x.view(torch.int32) & mask.to(torch.int32)).view(x.dtype)
    return x * -mask
