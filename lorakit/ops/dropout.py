"""LoRA's dropout: a mask that is drawn from a seed, kept as one bit an element, and shared by all linears that read the input.

    masked(x)[i] = x[i] with probability 1 - p, else 0        (not divided by 1 - p: that goes into LoRA's scale)

On a CPU the bits come from numpy's SFC64, 8 (or 16) random bits an element, and the mask is packed for backward: unpacking takes a fifth
of the time of drawing again, and the packed mask 1/32 of the memory of a float32 x. On other devices backward draws it again from the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# p is rounded to a multiple of 1/256 where that is within 2 % of p, else of 1/65536: with half the random bits a mask of
# 1,024 x 1,408 takes 0.24 instead of 0.48 ns an element.
CLOSE = 0.02
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class Mask(NamedTuple):
    """Which elements of an input are kept. `state`: the packed bits on a CPU, elsewhere the seed, as a tensor that autograd can save."""

    p: float
    state: Tensor


def draw_seed() -> int:
    """A seed from torch's own generator: `torch.manual_seed` governs it, and gradient checkpointing draws it again."""
    return int(torch.randint(1 << 62, ()))


def kept_share(p: float) -> float:
    """The exact probability with which an element is kept."""
    dropped, steps = _rounded(p)
    return 1 - dropped / steps


def draw_mask(x: Tensor, p: float, seed: int) -> Mask:
    """The mask of an input of x's shape: a function of the shape, p and the seed."""
    if _planned(x):
        return Mask(p, x.new_empty(-(-x.numel() // 8), dtype=torch.uint8))
    if x.device.type != "cpu":
        return Mask(p, torch.tensor(seed))
    dropped, steps = _rounded(p)
    unsigned = np.uint8 if steps == 256 else np.uint16
    random: np.ndarray = np.random.SFC64(seed).random_raw(-(-x.numel() * unsigned().nbytes // 8)).view(unsigned)[: x.numel()]
    return Mask(p, torch.from_numpy(np.packbits(np.greater_equal(random, dropped))))


def masked(x: Tensor, mask: Mask) -> Tensor:
    """x with what is dropped set to zero; a new tensor, without gradients."""
    if x.device.type == "cpu" or _planned(x):
        integer = _INTEGERS[x.element_size()]
        return (x.view(integer) & _bits(x, mask).to(integer)).view(x.dtype)  # all bits of an element or none
    generator = torch.Generator(x.device).manual_seed(int(mask.state))
    return torch.empty_like(x).bernoulli_(kept_share(mask.p), generator=generator).mul_(x)


def scaled(x: Tensor, mask: Mask) -> Tensor:
    """Dropout in plain operations that autograd follows: x, masked and divided by the share that is kept."""
    return x * (masked(torch.ones_like(x), mask) / kept_share(mask.p))


def _bits(x: Tensor, mask: Mask) -> Tensor:
    """-1 (kept) or 0, int8, in x's shape."""
    if _planned(x):
        return x.new_empty(x.shape, dtype=torch.int8)
    bits = np.unpackbits(mask.state.numpy(), count=x.numel()).view(np.int8)
    return torch.from_numpy(np.negative(bits, out=bits)).view(x.shape)


def _rounded(p: float) -> tuple[int, int]:
    """p as a fraction: so many of so many steps. Something is always kept, as the scale divides by its share."""
    steps = 256 if abs(round(256 * p) - 256 * p) <= CLOSE * 256 * p else 65536
    return min(round(p * steps), steps - 1), steps


def _planned(x: Tensor) -> bool:
    """Whether x has a shape only: on the meta device, or a fake tensor that stands for one of a CPU."""
    return x.device.type == "meta" or (type(x) is not Tensor and x.device.type == "cpu")
