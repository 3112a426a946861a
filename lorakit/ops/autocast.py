"""Detect autocast, and run a backward without it, in the precision that its forward chose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def is_casting(x: torch.Tensor) -> bool:
    """Whether autocast is enabled for x's device ("meta" has none)."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(backward: Callable[..., Any]) -> Any:  # torch declares backward in its own way
    """Disable autocast inside an autograd function's backward: saved tensors have the dtypes that the forward chose."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        if not is_casting(grads[0]):
            return backward(ctx, *grads)
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run
