"""Detect whether tensors have changed since something was computed from them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn


class Versions:
    """Some tensors as they are now: which they are, where, how often they have been written to, and the sums of trained
    ones: some optimizers, and moving averages that stand in for an evaluation, write through `.data`, which does not
    count.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._known = [(weakref.ref(t), t._version, _address(t), _sum(t)) for t in tensors]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self | None:
        """Return the versions; None for tensors whose changes cannot be seen (or not without waiting for a GPU)."""
        unseen = any(t.is_inference() or (t.requires_grad and not _is_at_hand(t)) for t in tensors)
        return None if unseen else cls(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged. Of frozen ones, a write through `.data` is not noticed."""
        if len(tensors) != len(self._known):
            return False
        for t, (known, version, address, total) in zip(tensors, self._known):
            if known() is not t or t._version != version or _address(t) != address or _sum(t) != total:
                return False
        return True


def _is_at_hand(t: Tensor) -> bool:
    return t.device.type == "cpu" and _address(t) != 0  # shapes without values have no address


def _sum(t: Tensor) -> float | None:
    return float(t.detach().sum()) if t.requires_grad else None


def _address(t: Tensor) -> int:
    # Tensor subclasses (quantized, sharded) may have no address.
    return t.data_ptr() if type(t) in (nn.Parameter, torch.Tensor) else 0
