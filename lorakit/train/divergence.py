"""Notice that a run has diverged: it has become worse than the base it started from, or cannot learn any more.

A run of which the loss is NaN or infinite stops in any case (`Run.not_finite`). One that diverged without that would
train on to its end: with a loss at ln(vocabulary), the loss of guessing, and a gradient that is exactly zero.
"""

from __future__ import annotations

# Nats. A held-out loss this far above the base's is a perplexity e times as high. Overfitting gets there only long
# after `patience` has stopped a run, and a fresh classifier's first steps stay below; rates that are too high get there
# within a few steps.
MARGIN = 1.0
# Up to this loss a gradient of exactly zero can come from a perfect fit: softmax rounds to one.
FITTED = 0.01


def is_dead(loss: float, norm: float) -> bool:
    """Whether a step cannot change anything although there is something to learn. `norm`: of the gradient."""
    return norm == 0 and loss > FITTED


def is_worse(loss: float, base: float) -> bool:
    """Whether a held-out loss is that of a run that has diverged. `base`: the base's loss on the same rows."""
    return loss > base + MARGIN


def may_be_worse(loss: float, first: float | None) -> bool:
    """Whether the base's held-out loss is worth computing. `first`: the training loss of the first step."""
    return first is None or loss > first - MARGIN
