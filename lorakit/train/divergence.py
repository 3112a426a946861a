"""Notice that a run has diverged: it has become worse than the base it started from, or cannot learn any more.

A run of which the loss is NaN or infinite stops in any case (`Run.not_finite`). One that diverged without that would
train on to its end: with a loss at ln(vocabulary), the loss of guessing, and a gradient that is exactly zero.
"""

from __future__ import annotations

# Up to this loss a gradient of exactly zero can come from a perfect fit: softmax rounds to one.
FITTED = 0.01


def is_dead(loss: float, norm: float) -> bool:
    """Whether a step cannot change anything although there is something to learn. `norm`: of the gradient."""
    return norm == 0 and loss > FITTED


def is_worse(loss: float, base: float, margin: float) -> bool:
    """Whether a held-out loss is that of a run that has diverged. `base`: the base's loss on the same rows; `margin`:
    `Task.margin`.
    """
    return loss > base + margin


def may_be_worse(loss: float, first: float | None, margin: float) -> bool:
    """Whether the base's held-out loss is worth computing. `first`: the training loss of the first step."""
    return first is None or loss > first - margin
