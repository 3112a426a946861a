"""The optimizers that `optimizer` names: which settings each has, its automatic learning rate, the bytes of its state.

Without torch: `train/optimizer.py` builds them, `plan` counts their state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    `settings`: those of beta1, beta2 and momentum that it has. `momentum`: the value for "auto". `rate`: its automatic
    learning rate as a multiple of AdamW's, with the reason; None if it has none. `state`: the bytes of its state for a
    parameter, from its shape and the size of an element.
    """

    summary: str
    settings: frozenset[str]
    rate: float | None
    why: str
    state: Callable[[Shape, int], int]
    momentum: float | None = None


# bitsandbytes keeps the state of smaller parameters in 32 bits, and has a float32 for each block of this many elements.
EIGHT_BIT_FROM, BLOCK = 4096, 256


def _copies(count: int) -> Callable[[Shape, int], int]:
    return lambda shape, itemsize: count * itemsize * math.prod(shape)


def _eight_bit(shape: Shape, itemsize: int) -> int:
    """Two averages, in 8 bits with a scale for each block."""
    elements = math.prod(shape)
    return 8 * elements if elements < EIGHT_BIT_FROM else 2 * (elements + 4 * math.ceil(elements / BLOCK))


def _row_and_column(shape: Shape, itemsize: int) -> int:
    """The means of squares of each row and of each column; of each element for a vector."""
    elements = math.prod(shape)
    if len(shape) < 2 or not elements:
        return itemsize * elements
    return itemsize * (elements // shape[-1] + elements // shape[-2])


def is_matrix(shape: Shape) -> bool:
    """Whether Muon can train a parameter of this shape: a matrix of more than one row and column."""
    return len(shape) == 2 and min(shape) > 1


def _muon(shape: Shape, itemsize: int) -> int:
    return _copies(1 if is_matrix(shape) else 2)(shape, itemsize)


_AS_ADAMW = ""
_BETAS = frozenset({"beta1", "beta2"})
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec("AdamW", _BETAS, 1.0, _AS_ADAMW, _copies(2)),
    "adamw8bit": OptimizerSpec("AdamW with its state in 8 bits (bitsandbytes)", _BETAS, 1.0, _AS_ADAMW, _eight_bit),
    "paged_adamw8bit": OptimizerSpec(
        "the same, its state moved to the CPU's memory when the GPU's is full", _BETAS, 1.0, _AS_ADAMW, _eight_bit
    ),
    # With torch's own scaling by a parameter's size (eps[1] = 1e-3), B, which starts at zero, would hardly move.
    "adafactor": OptimizerSpec(
        "Adafactor, without scaling by a parameter's size", frozenset(), 1.0, _AS_ADAMW, _row_and_column
    ),
    "sgd": OptimizerSpec("SGD with momentum", frozenset({"momentum"}), None, "", _copies(1), 0.9),
    # Chen et al. 2023, section 5: a suitable rate for Lion is typically 3 to 10 times smaller than AdamW's.
    "lion": OptimizerSpec(
        "Lion (Chen et al. 2023)", frozenset({"beta1", "momentum"}), 0.2, "a 5th of AdamW's for Lion", _copies(1), 0.99
    ),
    # Its updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training").
    "muon": OptimizerSpec(
        "Muon for matrices, AdamW for the rest", frozenset({"beta1", "beta2", "momentum"}), 1.0, _AS_ADAMW, _muon, 0.95
    ),
}


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state for these trained parameters.

    Muon's is counted as if embeddings were trained as other matrices are.
    """
    state = OPTIMIZERS[optimizer].state
    return sum(state(tuple(p.shape), p.element_size()) for p in parameters)
