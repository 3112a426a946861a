"""What every adapted module has: its adapters' updates as children, and which of them are active.

A module `q_proj` with adapters "default" and "sql" has the children `q_proj.lora_default` and `q_proj.lora_sql`, each
with parameters of its own (of a LoRA A and B). Nothing else about the module changes: its own parameters keep their
names.

What a child computes is its own matter (`updates.update`); the layer knows how to apply a pair of thin matrices, or a
weight of its own shape, to what it is given.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..adapter.lora import Kind
    from .batched.routes import Routing
    from .updates.update import LiveUpdate, Pair

PREFIX = "lora_"
COUNT = "_lora_children"  # an adapted module's attribute: how many adapters' updates it has
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
        "updated",
        "branch",
        "apply",
        "plain",
        "class_attributes",
        "fresh_output",
        "probed",
        "route",
    }
)


def child_name(adapter: str) -> str:
    """The child's name for an adapter. Dots, which torch forbids there, become U+2219;
    a name that is taken gets a "_".
    """
    taken = adapter.rstrip("_") in _TAKEN  # so "full" becomes "full_", and "full_" "full__"
    return PREFIX + adapter.replace(".", "∙") + ("_" if taken else "")


class Own(nn.Module):
    """A child that lorakit adds to a module, none of the base's own."""


def add_update(layer: Any, child: str, update: LiveUpdate) -> None:
    layer.add_module(child, update)
    layer.__dict__[COUNT] = layer.__dict__.get(COUNT, 0) + 1


def remove_update(layer: Any, child: str) -> LiveUpdate:
    update: LiveUpdate = layer._modules.pop(child)
    layer.__dict__[COUNT] -= 1
    return update


if TYPE_CHECKING:
    _Module = nn.Module  # what the mixins are put in front of
else:
    _Module = object


class Swapped(_Module):
    """A mixin in front of a module's own class. The class so made has no name to import; a pickle names the two
    instead.
    """

    lora_probed: ClassVar[Callable[..., Any]]  # the forward of its own class when the adapted class was made

    @classmethod
    def lora_class_attributes(cls, base: type[nn.Module]) -> dict[str, object]:
        """What an adapted class says about the base class behind the mixin."""
        return {}

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        assert not isinstance(reduced, str)
        function, args, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            from .layer import mixin_and_base, rebuild

            return rebuild, mixin_and_base(type(self)), *rest
        return function, args, *rest


def adapted_class(mixin: type[Swapped], base: type[nn.Module]) -> type[nn.Module]:
    """The class of modules with this mixin in front of their own class: made once, as torch's parametrizations do."""
    made = _adapted.get((mixin, base))
    if made is None:
        names = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_probed": base.forward}
        made = _adapted[mixin, base] = type(
            "Lora" + base.__name__, (mixin, base), names | mixin.lora_class_attributes(base)
        )
    return made


_adapted: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def mixin_and_base(cls: type) -> tuple[type[LoraLayer], type[nn.Module]]:
    """What `adapted_class` was made of."""
    mixin, base = cls.__bases__
    return mixin, base


def rebuild(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    """An empty instance of an adapted class; used by pickle."""
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)


class LoraLayer(Swapped):
    """The mixin's state. `lora_active` is a tuple of (child's name, weight); `lora_merged` tells that ΔW is in the
    weight now.
    """

    weight: Tensor
    bias: Tensor | None
    _modules: dict[str, Any]  # the updates among them
    lora_kind: Kind  # how A and B are to be read
    lora_transposed = False  # the weight is [in, out]
    lora_active: tuple[tuple[str, float], ...]
    lora_merged: Any
    lora_route: Routing | None = None  # set on the instance while inside `lorakit.route`, see `batched.routes`

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = super().forward(x, *args, **kwargs)
        if self.lora_route is not None:
            return self.lora_route.add_updates(self, y, x)
        active = self.lora_in_use()
        return self.lora_updated(y, x, active) if active else y

    def lora_in_use(self) -> list[tuple[LiveUpdate, float]]:
        """The updates that the forward has to add, each with its weight."""
        if self.lora_merged is not None:
            return []
        children = self._modules
        return [(children[name], weight) for name, weight in self.lora_active if weight != 0]

    def lora_updated(self, y0: Tensor, x: Tensor, active: list[tuple[LiveUpdate, float]]) -> Tensor:
        """The base's output with these updates added."""
        y, pairs = y0, []
        for update, weight in active:
            pair = update.pair()
            if pair is None:
                y = y + update.change(self, x, y0) * weight
            else:
                pairs.append((pair, pair.scale * weight))
        for pair, scale in pairs:  # last, as they may be added in place
            y = self.lora_add(y, x, pair, scale)
        return y

    def lora_add(self, y: Tensor, x: Tensor, pair: Pair, scale: float) -> Tensor:
        """y + scale · B A x."""
        return y + self.lora_branch(x, pair, y) * scale

    def lora_branch(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        """B A x with the pair's dropout, in the dtype of the base's output `like`."""
        raise NotImplementedError

    def lora_apply(self, x: Tensor, W: Tensor) -> Tensor:
        """What the layer makes of x with this weight, of its own one's shape, and without bias. In W's dtype."""
        raise NotImplementedError

    def lora_sizes(self) -> tuple[int, int]:
        """(in, out) of a linear."""
        raise NotImplementedError

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        """The shapes of a fresh A and B. `parts`: the adapted parts of a packed projection."""
        raise NotImplementedError

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        """Why these factors do not fit this module, or None."""
        expected = self.lora_shapes(A.shape[0])
        if tuple(A.shape) == expected[0] and tuple(B.shape) == expected[1]:
            return None
        return (
            f"A {list(A.shape)} and B {list(B.shape)} do not fit; expected A {list(expected[0])} and B "
            f"{list(expected[1])}"
        )

    def lora_fresh(
        self, shapes: Shapes, rank: int, init: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A fresh A and B of these shapes with ΔW = 0."""
        A, B = torch.empty(shapes[0], dtype=dtype, device=device), torch.zeros(shapes[1], dtype=dtype, device=device)
        init_a(A, init, rank)
        return A, B

    def lora_full(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B as files and the adapter value hold them."""
        return pair.A.detach(), pair.B.detach()


def init_a(A: Tensor, init: str, rank: int) -> None:
    """A's start, in place: kaiming-uniform(√5) as in loralib, or gaussian with deviation 1 / rank."""
    if A.is_meta:
        return
    with torch.no_grad():
        if init == "gaussian":
            A.normal_(std=1 / rank)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
