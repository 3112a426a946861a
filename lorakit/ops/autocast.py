"""Backward in the precision of its forward, whatever autocast is on when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def without_autocast(backward: Callable[..., Any]) -> Any:  # torch declares backward in its own way
    """An autograd function's backward with autocast off: what was saved has the dtypes that the forward chose."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        device = grads[0].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run
