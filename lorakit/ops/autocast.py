"""Whether autocast is on, and backward in the precision of its forward, whatever autocast is on when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def is_casting(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device (it does not know of "meta")."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(backward: Callable[..., Any]) -> Any:  # torch declares backward in its own way
    """An autograd function's backward with autocast off: what was saved has the dtypes that the forward chose."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        if not is_casting(grads[0]):
            return backward(ctx, *grads)
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run
