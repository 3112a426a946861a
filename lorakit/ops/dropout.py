"""LoRA's dropout: a mask drawn from a seed, stored as one bit per element, shared by all linears that read the input.

    masked(x)[i] = x[i] with probability 1 - p, else 0        (not divided by 1 - p: LoRA's scale includes that)

On a CPU the mask comes from numpy's SFC64, with 8 (or 16) random bits per element, and is packed for backward:
unpacking takes a fifth of the time of drawing it again, and the packed mask 1/32 of the memory of a float32 x. On other
devices, backward draws it again from the seed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# p is rounded to a multiple of 1/256 if that is within 2 % of p, else of 1/65536. With half the random bits, a mask of
# 1,024 x 1,408 takes 0.24 instead of 0.48 ns per element.
ROUNDING_TOLERANCE = 0.02
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes


class Mask(NamedTuple):
    """Which elements of an input are kept. `state`: the packed bits on a CPU, elsewhere the seed, as a tensor."""

    p: float
    state: Tensor


def draw_seed() -> int:
    """Draw a seed from torch's generator, so that `torch.manual_seed` and gradient checkpointing reproduce it."""
    return int(torch.randint(1 << 62, (), device="cpu"))


def kept_share(p: float) -> float:
    """Return the exact probability with which an element is kept."""
    dropped, steps = _rounded(p)
    return 1 - dropped / steps


def draw_mask(x: Tensor, p: float, seed: int) -> Mask:
    """Draw the mask for an input of x's shape. It depends on the shape, p and the seed only."""
    if has_no_values(x):
        return Mask(p, x.new_empty(-(-x.numel() // 8), dtype=torch.uint8))
    if x.device.type != "cpu":
        return Mask(p, torch.tensor(seed, device="cpu"))
    dropped, steps = _rounded(p)
    unsigned = np.uint8 if steps == 256 else np.uint16
    random: np.ndarray = (
        np.random.SFC64(seed).random_raw(-(-x.numel() * unsigned().nbytes // 8)).view(unsigned)[: x.numel()]
    )
    return Mask(p, torch.from_numpy(np.packbits(np.greater_equal(random, dropped))))


def masked(x: Tensor, mask: Mask) -> Tensor:
    """Return a copy of x with dropped elements set to zero, without gradients."""
    if x.device.type == "cpu" or has_no_values(x):
        return (x.view(_INTEGERS[x.element_size()]) & _wide(x, mask)).view(x.dtype)  # keeps all bits of an element or 0
    generator = torch.Generator(x.device).manual_seed(int(mask.state))
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(kept_share(mask.p), generator=generator).mul_(x)
    )


def masked_input(x: Tensor, mask: Mask | None) -> Tensor:
    """Return `masked(x, mask)`, or x without a mask. Do not modify it: linears that read one input share the result."""
    if mask is None:
        return x
    if has_no_values(x) or x.is_inference() or mask.state.is_inference() or x.device.type != "cpu":
        return masked(x, mask)
    return _latest_inputs.of(x, mask, masked)


class _Latest(threading.local):
    """A one-entry cache per thread: the last result of a function of a tensor and a mask, while both are alive.

    q, k and v need the same masked input, one after the other, in forward and again in backward. (Writes through
    `.data` are not noticed, nor does autograd notice them; each forward has a new mask anyway.)
    """

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.result: Tensor | None = None
        self.alive: list[weakref.ref] = []

    def of(self, x: Tensor, mask: Mask, compute: Callable[[Tensor, Mask], Tensor]) -> Tensor:
        """Return compute(x, mask), computed again only if x or the mask has changed."""
        key = _identity(x), _identity(mask.state), mask.p
        cached = self.result
        if cached is None or key != self.key:
            fields = self.__dict__  # this thread's
            self.alive = []  # first, so that the previous entry's finalizers cannot clear the new result
            result = compute(x, mask)
            self.alive = [
                weakref.ref(t.untyped_storage(), lambda _: fields.update(result=None)) for t in (x, mask.state)
            ]
            self.key, self.result = key, result
            return result
        return cached


_latest_inputs, _latest_wide = _Latest(), _Latest()


def _identity(x: Tensor) -> tuple:
    """Return a key that identifies a live tensor, whichever Python object wraps it."""
    return x.untyped_storage()._cdata, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype


def scaled(x: Tensor, mask: Mask) -> Tensor:
    """Apply dropout in plain operations that autograd differentiates: x, masked and divided by the kept share."""
    return x * (masked(torch.ones_like(x), mask) / kept_share(mask.p))


def _wide(x: Tensor, mask: Mask) -> Tensor:
    """Return -1 (kept) or 0 in x's shape, as integers of the size of x's elements."""
    integer = _INTEGERS[x.element_size()]
    if has_no_values(x):
        return x.new_empty(x.shape, dtype=integer)
    if mask.state.is_inference():
        return _unpacked(mask, x.numel()).to(integer).view(x.shape)
    wide = _latest_wide.of(mask.state, mask, lambda _, mask: _unpacked(mask, x.numel()).to(integer))
    return (wide if wide.dtype == integer else _unpacked(mask, x.numel()).to(integer)).view(x.shape)


def _unpacked(mask: Mask, elements: int) -> Tensor:
    """Unpack a CPU mask to -1 (kept) or 0: [elements], int8."""
    bits = np.unpackbits(mask.state.numpy(), count=elements).view(np.int8)
    return torch.from_numpy(np.negative(bits, out=bits))


def _rounded(p: float) -> tuple[int, int]:
    """Round p to a fraction (numerator, denominator) below 1, as the scale divides by the kept share."""
    steps = 256 if abs(round(256 * p) - 256 * p) <= ROUNDING_TOLERANCE * 256 * p else 65536
    return min(round(p * steps), steps - 1), steps


def has_no_values(x: Tensor) -> bool:
    """Whether x has a shape but no values: it is on the meta device, or a fake tensor."""
    return x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
