"""What an adapted module asks of an update that it carries. The child module is the strategy: the layers know no kind.

    y = base(x) + Σ weight · change(x, base(x))

An update that is a pair of thin matrices gives it as `pair`, and the layers compute s · B A x themselves: fused with
the base, for many adapters of a batch at once, in place. Any other computes its own `change`. What merging adds is
asked of its value (`adapter.update`).

A kind is a file beside this one, named as `LoraConfig.variant` and the value's `variant` name it, whose class is
`Live`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from ...adapter.update import Rows, Update
from ...config import LoraConfig
from ..bases import base_of
from ..layer import Own

if TYPE_CHECKING:
    from ..layer import LoraLayer


class Pair(Protocol):
    """s · B A, with dropout on its input. Of the layer's own shapes: a packed B is [n, out/parts, r]."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def dropout(self) -> float: ...


class LiveUpdate(Own):
    """One adapter's update of one module, with its parameters."""

    rank: int
    width = 0  # how many ranks its pair takes in a stack of adapters; 0 without a pair

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        """With ΔW = 0, for the layer called `name`."""
        raise NotImplementedError

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Any, dropout: float, trainable: bool) -> Self:
        """A value's update, copied to the layer's device. AdapterError if it does not fit the layer."""
        raise NotImplementedError

    def value(self, layer: LoraLayer) -> Update:
        """The value that this is, of its own tensors, detached: no copies."""
        raise NotImplementedError

    def pair(self) -> Pair | None:
        """The pair of matrices that it is, or None."""
        return None

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        """What it adds to the base's output y0, of y0's dtype. Asked only where there is no pair."""
        raise NotImplementedError

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        """`weight` · ΔW by blocks of rows of the layer's weight, on its device."""
        base = base_of(layer)
        device = base.device(layer)
        value = self.value(layer).map(lambda _, t: t.to(device))
        return value.rows(base.shape(layer), layer.lora_transposed, weight)


def live(variant: str) -> type[LiveUpdate]:
    """The class of a kind that `config.variants` lists."""
    return importlib.import_module(f".{variant}", __package__).Live


def master_dtype(layer: LoraLayer) -> torch.dtype:
    """Of what is trained: float32 (float64 over a float64 base)."""
    return torch.float64 if base_of(layer).dtype(layer) == torch.float64 else torch.float32


def device_of(layer: LoraLayer) -> torch.device:
    """The layer's device, where accelerate's offload leaves its weight on "meta" between calls the
    one it is called on.
    """
    hook = layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else base_of(layer).device(layer)
