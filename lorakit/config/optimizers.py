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
# Muon's learning rate over that of the AdamW beside it. With the scaling that makes its updates as large as AdamW's in
# pretraining (Liu et al. 2025: 0.2 of the rate), LoRA's factors need a higher one, see below.
MUON_OVER_ADAMW = 3.0


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
    # Held-out loss of the embedded model after 40 steps of 4 rows, one seed, at learning rates of 2.5e-3, 5e-3, 1e-2,
    # 2e-2: AdamW 1.96, 1.78; Lion 1.81, 1.70, 1.80; Muon 2.56, 2.20, 1.84, 1.71 (2.21 at 4e-2). A fifth of AdamW's
    # rate, as Chen et al. 2023 (section 5) have it for longer runs, was too little for Lion (1.90 against 1.57).
    "lion": OptimizerSpec(
        "Lion (Chen et al. 2023)", frozenset({"beta1", "momentum"}), 0.5, "half of AdamW's for Lion", _copies(1), 0.99
    ),
    "muon": OptimizerSpec(
        "Muon for matrices, AdamW for the rest",
        frozenset({"beta1", "beta2", "momentum"}),
        MUON_OVER_ADAMW,
        f"{MUON_OVER_ADAMW:g} times AdamW's for Muon",
        _muon,
        0.95,
    ),
}


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state for these trained parameters.

    Muon's is counted as if embeddings were trained as other matrices are.
    """
    state = OPTIMIZERS[optimizer].state
    return sum(state(tuple(p.shape), p.element_size()) for p in parameters)
