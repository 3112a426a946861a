"""What every adapted module has: its adapters' factors as children, and which of them are active.

A module `q_proj` with adapters "default" and "sql" has the children `q_proj.lora_default` and `q_proj.lora_sql`, each with
parameters A and B. Nothing else about the module changes: its own parameters keep their names.
"""

from __future__ import annotations

import copyreg
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import scale_of

if TYPE_CHECKING:
    from .batched.routes import Routing

PREFIX = "lora_"
COUNT = "_lora_children"  # an adapted module's attribute: how many adapters' factors it has
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of A and of B

# What an adapted module has of its own under the prefix.
_TAKEN = frozenset(
    {
        "saved",
        "active",
        "merged",
        "parts",
        "kind",
        "transposed",
        "in_use",
        "shapes",
        "fits",
        "fresh",
        "full",
        "sizes",
        "add",
        "plain",
        "class_attributes",
        "fresh_output",
        "route",
    }
)


def child_name(adapter: str) -> str:
    """The child's name for an adapter. Dots, which torch forbids there, become U+2219; a name that is taken gets a "_"."""
    taken = adapter.rstrip("_") in _TAKEN  # so "full" becomes "full_", and "full_" "full__"
    return PREFIX + adapter.replace(".", "∙") + ("_" if taken else "")


class Own(nn.Module):
    """A child that lorakit adds to a module, none of the base's own."""


class LoraFactors(Own):
    """One adapter's A and B on one module, with what is needed to use them. Shapes: see the layer's file."""

    def __init__(self, A: Tensor, B: Tensor, alpha: float, rslora: bool, dropout: float, trainable: bool):
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=trainable)
        self.B = nn.Parameter(B, requires_grad=trainable)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.rank = B.shape[-1] if B.dim() == 3 and A.dim() == 2 else A.shape[0]  # packed B is [n, out, r]

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, A={list(self.A.shape)}, B={list(self.B.shape)}"


def add_factors(layer: Any, child: str, factors: LoraFactors) -> None:
    layer.add_module(child, factors)
    layer.__dict__[COUNT] = layer.__dict__.get(COUNT, 0) + 1


def remove_factors(layer: Any, child: str) -> LoraFactors:
    factors: LoraFactors = layer._modules.pop(child)
    layer.__dict__[COUNT] -= 1
    return factors


class Swapped:
    """A mixin in front of a module's own class. The class so made has no name to import; a pickle names the two instead."""

    @classmethod
    def lora_class_attributes(cls, base: type[nn.Module]) -> dict[str, object]:
        """What an adapted class says about the base class behind the mixin."""
        return {}

    def __reduce_ex__(self, protocol):
        function, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            from .layer import mixin_and_base, rebuild

            return rebuild, mixin_and_base(type(self)), *rest
        return function, args, *rest


@functools.cache
def adapted_class(mixin: type[Swapped], base: type[nn.Module]) -> type[nn.Module]:
    """The class of modules with this mixin in front of their own class: made once, as torch's parametrizations do."""
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_probed": base.forward}
    return type("Lora" + base.__name__, (mixin, base), names | mixin.lora_class_attributes(base))


def mixin_and_base(cls: type) -> tuple[type[LoraLayer], type[nn.Module]]:
    """What `adapted_class` was made of."""
    mixin, base = cls.__bases__
    return mixin, base


def rebuild(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    """An empty instance of an adapted class; used by pickle."""
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)


class LoraLayer(Swapped):
    """The mixin's state. `lora_active` is a tuple of (child's name, weight); `lora_merged` tells that ΔW is in the weight now."""

    lora_kind: str  # "linear", "embedding" or "conv": how A and B are to be read
    lora_transposed = False  # the weight is [in, out]
    lora_active: tuple[tuple[str, float], ...]
    lora_merged: Any
    lora_route: Routing | None = None  # set on the instance while inside `lorakit.route`, see `batched.routes`

    def lora_in_use(self) -> list[tuple[LoraFactors, float]]:
        """The factors that the forward has to add, each with its scale times its weight."""
        if self.lora_merged is not None:
            return []
        children = self._modules  # type: ignore[attr-defined]
        return [(f, f.scale * weight) for f, weight in ((children[n], w) for n, w in self.lora_active) if weight != 0]

    def lora_shapes(self, rank: int) -> Shapes:
        """The shapes of a fresh A and B."""
        raise TypeError(f"{type(self).__name__} does not say the shapes of its factors")

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        """Why these factors do not fit this module, or None."""
        expected = self.lora_shapes(A.shape[0])
        if tuple(A.shape) == expected[0] and tuple(B.shape) == expected[1]:
            return None
        return f"A {list(A.shape)} and B {list(B.shape)} do not fit; expected A {list(expected[0])} and B {list(expected[1])}"

    def lora_fresh(self, shapes: Shapes, rank: int, init: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A fresh A and B of these shapes with ΔW = 0."""
        A, B = torch.empty(shapes[0], dtype=dtype, device=device), torch.zeros(shapes[1], dtype=dtype, device=device)
        init_a(A, init, rank)
        return A, B

    def lora_full(self, factors: LoraFactors) -> tuple[Tensor, Tensor]:
        """A and B as files and the adapter value hold them."""
        return factors.A.detach(), factors.B.detach()


def init_a(A: Tensor, init: str, rank: int) -> None:
    """A's start, in place: kaiming-uniform(√5) as in loralib, or gaussian with deviation 1 / rank."""
    if A.is_meta:
        return
    with torch.no_grad():
        if init == "gaussian":
            A.normal_(std=1 / rank)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
