"""Detect whether tensors have changed since something was computed from them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn


class Versions:
    """Some tensors as they are now: which they are, where, and how often they have been written to."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._known = [(weakref.ref(t), t._version, _address(t)) for t in tensors]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self | None:
        """Return the versions; None for tensors that do not count how often they are written to."""
        return None if any(t.is_inference() for t in tensors) else cls(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged. A write through `.data` is not noticed."""
        if len(tensors) != len(self._known):
            return False
        for t, (known, version, address) in zip(tensors, self._known):
            if known() is not t or t._version != version or _address(t) != address:
                return False
        return True


def _address(t: Tensor) -> int:
    # Tensor subclasses (quantized, sharded) may have no address.
    return t.data_ptr() if type(t) in (nn.Parameter, torch.Tensor) else 0
