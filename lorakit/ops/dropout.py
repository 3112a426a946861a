"""LoRA's dropout: a mask that is drawn from a seed, kept as one bit an element, and shared by all linears that read the
input.

    masked(x)[i] = x[i] with probability 1 - p, else 0        (not divided by 1 - p: that goes into LoRA's scale)

On a CPU the bits come from numpy's SFC64, 8 (or 16) random bits an element, and the mask is packed for backward:
unpacking takes a fifth of the time of drawing again, and the packed mask 1/32 of the memory of a float32 x. On other
devices backward draws it again from the seed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# p is rounded to a multiple of 1/256 where that is within 2 % of p, else of 1/65536: with half the random bits a mask
# of 1,024 x 1,408 takes 0.24 instead of 0.48 ns an element.
ROUNDING_TOLERANCE = 0.02
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class Mask(NamedTuple):
    """Which elements of an input are kept. `state`: the packed bits on a CPU, elsewhere the seed, as a tensor that
    autograd can save.
    """

    p: float
    state: Tensor


def draw_seed() -> int:
    """A seed from torch's own generator: `torch.manual_seed` governs it, and gradient checkpointing draws it again."""
    return int(torch.randint(1 << 62, (), device="cpu"))


def kept_share(p: float) -> float:
    """The exact probability with which an element is kept."""
    dropped, steps = _rounded(p)
    return 1 - dropped / steps


def draw_mask(x: Tensor, p: float, seed: int) -> Mask:
    """The mask of an input of x's shape: a function of the shape, p and the seed."""
    if planned(x):
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
    """x with what is dropped set to zero; a new tensor, without gradients."""
    if x.device.type == "cpu" or planned(x):
        return (x.view(_INTEGERS[x.element_size()]) & _wide(x, mask)).view(x.dtype)  # all bits of an element or none
    generator = torch.Generator(x.device).manual_seed(int(mask.state))
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(kept_share(mask.p), generator=generator).mul_(x)
    )


def masked_input(x: Tensor, mask: Mask | None) -> Tensor:
    """The same for a linear's input, x itself without a mask. Not to be changed: linears that read one input get one
    tensor.
    """
    if mask is None:
        return x
    if planned(x) or x.is_inference() or mask.state.is_inference() or x.device.type != "cpu":
        return masked(x, mask)
    return _latest_inputs.of(x, mask, masked)


class _Latest(threading.local):
    """The last result of a function of a tensor and a mask, for as long as both are alive.

    q, k and v ask for the same masked input, one after the other, in forward and again in backward. (Writing through
    `.data` is not seen, as autograd does not see it; each forward has a mask of its own.)
    """

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.made: Tensor | None = None
        self.alive: list[weakref.ref] = []

    def of(self, x: Tensor, mask: Mask, make: Callable[[Tensor, Mask], Tensor]) -> Tensor:
        """make(x, mask), recomputed only when x or the mask has changed."""
        key = _place(x), _place(mask.state), mask.p
        found = self.made
        if found is None or key != self.key:
            fields = self.__dict__  # this thread's
            self.alive = []  # first, so that what was watched before can no longer clear what is made now
            made = make(x, mask)
            self.alive = [weakref.ref(t.untyped_storage(), lambda _: fields.update(made=None)) for t in (x, mask.state)]
            self.key, self.made = key, made
            return made
        return found


_latest_inputs, _latest_wide = _Latest(), _Latest()


def _place(x: Tensor) -> tuple:
    """Identifies a live tensor, whichever Python object wraps it."""
    return x.untyped_storage()._cdata, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype


def scaled(x: Tensor, mask: Mask) -> Tensor:
    """Dropout in plain operations that autograd follows: x, masked and divided by the share that is kept."""
    return x * (masked(torch.ones_like(x), mask) / kept_share(mask.p))


def _wide(x: Tensor, mask: Mask) -> Tensor:
    """-1 (kept) or 0, in x's shape, as integers that are as wide as x's elements."""
    integer = _INTEGERS[x.element_size()]
    if planned(x):
        return x.new_empty(x.shape, dtype=integer)
    if mask.state.is_inference():
        return _unpacked(mask, x.numel()).to(integer).view(x.shape)
    made = _latest_wide.of(mask.state, mask, lambda _, mask: _unpacked(mask, x.numel()).to(integer))
    return (made if made.dtype == integer else _unpacked(mask, x.numel()).to(integer)).view(x.shape)


def _unpacked(mask: Mask, elements: int) -> Tensor:
    """-1 (kept) or 0, int8."""
    bits = np.unpackbits(mask.state.numpy(), count=elements).view(np.int8)
    return torch.from_numpy(np.negative(bits, out=bits))


def _rounded(p: float) -> tuple[int, int]:
    """p as a fraction: so many of so many steps. Something is always kept, as the scale divides by its share."""
    steps = 256 if abs(round(256 * p) - 256 * p) <= ROUNDING_TOLERANCE * 256 * p else 65536
    return min(round(p * steps), steps - 1), steps


def planned(x: Tensor) -> bool:
    """Whether x has a shape only: on the meta device, or a fake tensor that stands for one of a CPU."""
    return x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
