"""What all adapted modules share: their adapters' updates as children, and which of them are active.

A module `q_proj` with adapters "default" and "sql" has the children `q_proj.lora_default` and `q_proj.lora_sql`, each
with its own parameters (A and B for LoRA). The module's own parameters keep their names.

What a child computes is up to its kind (`updates.update`). The layer can apply a pair of low-rank matrices, or a weight
of its own shape, to its input.
"""

from __future__ import annotations

import copyreg
import math
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.gain import add_gain, excess

if TYPE_CHECKING:
    from ..adapter.lora import Kind
    from .batched.routes import Routing
    from .updates.update import LiveUpdate, Pair

PREFIX = "lora_"
COUNT = "_lora_children"  # the attribute of an adapted module that counts its updates
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of A and of B

# Names with this prefix that an adapted module itself uses.
_RESERVED = frozenset(
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
        "times_scale",
        "token_rows",
        "probed",
        "laid_out",
        "route",
        "by_output",
        "gained",
        "times_outputs",
        "live",
        "adopted",
        "released",
        "of_pairs",
        "computed",
        "check",
        "name",
        "virtual",
        "embedding",
        "decodes",
        "window",
        "own_input",
    }
)


def child_name(adapter: str) -> str:
    """Return the child's name for an adapter. Dots, which torch forbids, become U+2219; reserved names get a "_"."""
    reserved = adapter.rstrip("_") in _RESERVED  # so "full" becomes "full_", and "full_" becomes "full__"
    return PREFIX + adapter.replace(".", "∙") + ("_" if reserved else "")


class Own(nn.Module):
    """A child that lorakit adds to a module, as opposed to the base's own."""


def add_update(layer: Any, child: str, update: LiveUpdate) -> None:
    """Register an adapter's update as a child of an adapted module."""
    layer.add_module(child, update)
    layer.__dict__[COUNT] = layer.__dict__.get(COUNT, 0) + 1


def remove_update(layer: Any, child: str) -> LiveUpdate:
    """Remove an adapter's update from an adapted module, and return it."""
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
    """Return the class with this mixin in front of a module's own class. It is created once, as torch's
    parametrizations do.
    """
    cls = _adapted.get((mixin, base))
    if cls is None:
        names = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_probed": base.forward}
        cls = _adapted[mixin, base] = type(
            "Lora" + base.__name__, (*_bridge(base), mixin, base), names | mixin.lora_class_attributes(base)
        )
    return cls


def _bridge(base: type) -> tuple[type, ...]:
    """Return what an adapted class has in front so that instances of its base class may become instances of it.

    Python allows `module.__class__ = ...` only if both classes got their `__dict__` on top of the same class. nn.Module
    has it on top of `object`, like our mixins. quanto's QLinear, which derives from ABC first, has it on top of ABC; so
    the adapted class then needs a first base on top of ABC too.
    """
    below = base
    while below.__base__ is not None and below.__dictoffset__:
        below = below.__base__
    return () if below is object else (type("Bridge", (below,), {}),)


_adapted: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def mixin_and_base(cls: type) -> tuple[type[LoraLayer], type[nn.Module]]:
    """Return the mixin and the base class of an adapted class."""
    *_, mixin, base = cls.__bases__
    return mixin, base


def rebuild(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    """Create an empty instance of an adapted class, for pickle."""
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)


class LoraLayer(Swapped):
    """The base of all mixins. `lora_active`: (child's name, weight) of the active updates; `lora_merged`: the undo data
    of a merge (`merge.Merge`), None if nothing is merged.
    """

    weight: Tensor
    bias: Tensor | None
    _modules: dict[str, Any]  # the updates among them
    lora_transposed = False  # the weight is [in, out]
    lora_name: ClassVar[str | None] = None  # the name that adapters have for it, if it is not the model's own
    lora_active: tuple[tuple[str, float], ...]
    lora_merged: Any
    if TYPE_CHECKING:  # transformers evaluates the annotations of its models' subclasses, and these names are not here
        lora_kind: Kind  # how A and B relate to the weight
        lora_route: Routing | None  # set on the instance while inside `lorakit.route`, see `batched.routes`
    else:
        lora_route = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.lora_route is not None:
            return self.lora_route.add_updates(self, super().forward(x, *args, **kwargs), x)
        active = self.lora_in_use()
        if (own := self.lora_own_input(x, active)) is not None:
            return super().forward(own, *args, **kwargs)
        y = super().forward(x, *args, **kwargs)
        return self.lora_updated(y, x, active) if active else y

    def lora_own_input(self, x: Tensor, active: list[tuple[LiveUpdate, float]]) -> Tensor | None:
        """Return the input with which the base alone computes the updates too, if there is one."""
        if len(active) != 1 or active[0][0].width:
            return None
        return active[0][0].of_input(self, x, active[0][1])

    def lora_in_use(self) -> list[tuple[LiveUpdate, float]]:
        """Return the updates that the forward must add, each with its weight."""
        if self.lora_merged is not None:
            return []
        children = self._modules
        return [(children[name], weight) for name, weight in self.lora_active if weight != 0]

    def lora_updated(self, y0: Tensor, x: Tensor, active: list[tuple[LiveUpdate, float]]) -> Tensor:
        """Return the base's output y0 with these updates added. x: the layer's input."""
        y, pairs = y0, []
        for update, weight in active:
            pair = update.pair(self)
            if pair is None:
                y = y + update.change(self, x, y0) * weight
            else:
                pairs.append((pair, pair.scale * weight))
                if pair.gain is not None:
                    y = self.lora_gained(y, y0, excess(pair.gain, weight))
        for pair, scale in pairs:  # last, since they may be added in place
            y = self.lora_add(y, x, pair, scale)
        return y

    def lora_add(self, y: Tensor, x: Tensor, pair: Pair, scale: float) -> Tensor:
        """Return y + scale · B A x; may write into y."""
        return y + self.lora_branch(x, pair, y) * scale

    def lora_gained(self, y: Tensor, y0: Tensor, h: Tensor) -> Tensor:
        """Return y + h ∘ (y0 - b) (see `ops.gain`) as a new tensor. y0: the base's output; h: [out], or [rows, out]."""
        bias = getattr(self, "bias", None)
        return add_gain(y, y0, self.lora_by_output(h, y0), None if bias is None else self.lora_by_output(bias, y0))

    def lora_by_output(self, vector: Tensor, y: Tensor) -> Tensor:
        """Return a vector over the outputs, [out] or [rows, out], in a shape that broadcasts to the layer's output."""
        return vector if vector.dim() == 1 else vector.view(len(vector), *(1,) * (y.dim() - 2), -1)

    def lora_times_outputs(self, B: Tensor, g: Tensor) -> Tensor:
        """Return B with its outputs multiplied by g [out]."""
        return B * g.view(-1, *(1 for _ in B.shape[1:]))

    def lora_branch(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        """Return B A x with the pair's dropout, in the shape and dtype of the base's output `like`."""
        raise NotImplementedError

    def lora_apply(self, x: Tensor, W: Tensor) -> Tensor:
        """Apply the layer to x with the weight W, of the same shape as its own, and without bias. In W's dtype."""
        raise NotImplementedError

    def lora_times_scale(self, update: Tensor) -> Tensor:
        """Return an embedding's update times the factor that the module multiplies its output by, if it has one."""
        return update

    def lora_live(self, variant: str) -> str:
        """Return the kind of update that a config's `variant` is on this layer: the name of a file in `updates/`."""
        return variant

    def lora_token_rows(self) -> str | None:
        """Say why the weight has no row for each token, as an embedding and an output layer have; None if it may."""
        return "it is neither an embedding nor an output layer"

    def lora_adopted(self) -> None:
        """Called when the module has been given its adapted class."""

    def lora_released(self) -> None:
        """Called before the module is given its own class back."""

    def lora_sizes(self) -> tuple[int, int]:
        """Return (in, out) of a linear."""
        raise NotImplementedError

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        """Return the shapes of a new A and B. `parts`: the adapted parts of a packed projection."""
        raise NotImplementedError

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        """Say why these factors do not fit this module; None if they do."""
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
        """Initialize a new A and B of these shapes with ΔW = 0."""
        A, B = torch.empty(shapes[0], dtype=dtype, device=device), torch.zeros(shapes[1], dtype=dtype, device=device)
        init_a(A, init, rank)
        return self.lora_laid_out(A), B

    def lora_laid_out(self, A: Tensor) -> Tensor:
        """Return A in the memory format of the layer's weight."""
        return A

    def lora_full(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return A and B as they are stored in files and in an adapter value."""
        return pair.A.detach(), pair.B.detach()


def init_a(A: Tensor, init: str, rank: int) -> None:
    """Initialize A in place: kaiming-uniform(√5) as in loralib, or gaussian with standard deviation 1 / rank."""
    if A.is_meta:
        return
    with torch.no_grad():
        if init == "gaussian":
            A.normal_(std=1 / rank)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))


def rebind_hooked_forward(module: nn.Module) -> None:
    """Make accelerate's hooks call the forward of the module's current class."""
    # The hooks (device maps, offload) replace the instance's `forward` and call `_old_forward`, a method that was bound
    # when the hook was added. The adapted forward must run inside the hook, where the weights are loaded.
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
