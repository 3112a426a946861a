"""A model that computes shapes only: weights without memory, so that a step of any size can be run on any machine.

What is trained, and all that is computed from weights, are torch's fake tensors: they have shape, type, device and autograd,
but no numbers. Frozen weights stay plain parameters on the meta device, as layers ask for just that (a quantized weight would be
of another class), and operations are given fake tensors in their place. What is not computed from weights (token ids, labels,
positions, masks) stays real while it is small, as code asks it questions that need numbers: which positions are trained, is this
mask all ones. So the model, the layers and the loss run as they are, on the kernels that they would choose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Real tensors of more bytes than this are not made; a batch of ids has 8 bytes a token, so this is two million tokens.
LARGEST_REAL = 1 << 24

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default, _aten._unsafe_index_put.default,
}  # fmt: skip


class Shapes(TorchDispatchMode):
    """Inside this mode operations on weightless tensors give weightless tensors, and may be mixed with real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._for_meta: dict[int, tuple[Tensor, Tensor]] = {}  # the meta tensor too, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = flat((*args, *kwargs.values()))
        if any(_on_meta(value) for value in given):
            args, kwargs = tree_map(self._off_meta, (args, kwargs))
            given = flat((*args, *kwargs.values()))
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if any(isinstance(value, FakeTensor) for value in given):
            return func(*args, **kwargs)
        try:
            with self.fake:
                made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        size = sum(t.numel() * t.element_size() for t in flat((made,)) if isinstance(t, Tensor))
        return made if size > LARGEST_REAL else func(*args, **kwargs)

    def standing_for(self, meta: Tensor) -> Tensor:
        """The fake tensor on the CPU that operations are given for a tensor on the meta device, always the same."""
        if id(meta) not in self._for_meta:
            with self.fake:
                self._for_meta[id(meta)] = (meta, torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="cpu"))
        return self._for_meta[id(meta)][1]

    def _off_meta(self, value: Any) -> Any:
        if not _on_meta(value):
            return value
        return self.standing_for(value) if isinstance(value, Tensor) else torch.device("cpu")


def flat(values: Iterable[Any]) -> list[Any]:
    """Arguments or results of an operation, with those inside its lists. (torch's pytrees would take half of all the time.)"""
    found: list[Any] = []
    for value in values:
        found += value if isinstance(value, list | tuple) else (value,)
    return found


def _on_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, FakeTensor) and value.is_meta
    return isinstance(value, torch.device) and value.type == "meta"


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The indices with boolean masks as the positions that they mean, as the kernels do it: only a real mask tells how many."""
    found: list[Tensor | None] = []
    for index in indices:
        real_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if real_mask else [index]  # type: ignore[union-attr]
    return found


def without_memory(module: nn.Module, shapes: Shapes) -> list[Tensor]:
    """Replace trained parameters and buffers, in place, by fake ones; shared ones stay shared. Returns all that operations will see
    of the module's own: those, and what stands for the frozen parameters."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    held: dict[int, Tensor] = {}

    def fake(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = shapes.standing_for(old)
            made[id(old)] = (old, nn.Parameter(new, requires_grad=True) if isinstance(old, nn.Parameter) else new)
        return made[id(old)][1]

    for child in module.modules():
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if not isinstance(tensor, FakeTensor) and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
                    tensor = own[name] = fake(tensor)  # type: ignore[assignment]
                seen = tensor if isinstance(tensor, FakeTensor) else shapes.standing_for(tensor)
                held[id(seen)] = seen
    return list(held.values())
