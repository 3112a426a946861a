"""A model that computes shapes only: weights without memory, so that a step of any size can be run on any machine.

What is trained, and all that is computed from weights, is `Weightless`: a tensor on the CPU to all who ask, with shape,
type, strides and autograd, but without numbers. Behind it stands a tensor on the meta device, on which torch's own meta
kernels run; views of one another share a meta storage, so who shares memory with whom is known. Frozen weights stay
plain parameters on the meta device, as layers ask for just that (a quantized weight would be of another class). What is
not computed from weights (token ids, labels, positions, masks) stays real while it is small, as code asks it questions
that need numbers: which positions are trained, is this mask all ones. So the model, the layers and the loss run as they
are, on the kernels that they would choose.

torch's own FakeTensorMode does the same and more (devices, symbolic sizes, a cache), at about six times the cost of an
operation (a training step of the embedded model, 2 and 3 layers, LoRA: 1.2 to 1.6 s of CPU time against 0.26).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Real tensors of more bytes than this are not made. A batch of ids has 8 bytes a token, and has to be real.
LARGEST_REAL = 1 << 27
MOST_TOKENS = LARGEST_REAL // 8

_META = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index_put.default,
}
_BOOLEAN = (torch.bool, torch.uint8)


class Weightless(Tensor):
    """`meta`: the same tensor on the meta device, a view of the same storage as its other views' are."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Weightless:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.size(), strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=_CPU
        )
        made.meta = meta
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Weightless({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with Shapes():
            return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Inside this mode operations on weightless tensors give weightless tensors, and may be mixed with real ones."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; torch's guard against that costs more than all that is done here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if any(isinstance(value, Weightless) or _is_meta(value) for value in flat((*args, *kwargs.values()))):
            return _weightless(func, args, kwargs)
        args, kwargs = _swap(args, _off_meta), {name: _off_meta(value) for name, value in kwargs.items()}
        if _bytes_of(func, args, kwargs) <= LARGEST_REAL:
            return func(*args, **kwargs)
        return _weightless(func, args, kwargs)


class _Result(NamedTuple):
    """A result as it is known. `of`: the position of the argument that it is (without a size) or a view of; None: of
    none.
    """

    of: int | None
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None


# What operations give, by the operation and all of its arguments that decides it. Many of torch's meta kernels are
# Python code and take 0.2 ms; a look here takes a tenth of that. The type: of the sequence that the results come in,
# None for one alone.
_known: dict[Any, tuple[type | None, list[_Result | None]]] = {}


def _weightless(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation's results, weightless; those that it gives back as it got them are the same objects."""
    key = (func, *map(_described, args), *kwargs, *map(_described, kwargs.values()))
    given = _tensors(args, kwargs)
    if key not in _known:
        metas = [_meta_of(tensor) for tensor in given]
        made = _on_meta(func, args, kwargs, iter(metas))
        kind = type(made) if type(made) in (list, tuple) else None
        _known[key] = kind, [_result(value, metas) for value in ((made,) if kind is None else made)]
    kind, results = _known[key]
    every = [None if result is None else _made(result, given) for result in results]
    return every[0] if kind is None else kind(every)


def _result(value: Any, metas: list[Tensor]) -> _Result | None:
    if not isinstance(value, Tensor):
        return None
    for place, meta in enumerate(metas):
        if meta is value:
            return _Result(place)
    storage = value.untyped_storage()._cdata
    of = next((place for place, meta in enumerate(metas) if meta.untyped_storage()._cdata == storage), None)
    return _Result(of, tuple(value.size()), value.stride(), int(value.storage_offset()), value.dtype)


def _made(result: _Result, given: list[Tensor]) -> Tensor:
    of, size, stride, offset, dtype = result
    if of is None:
        return Weightless(torch.empty_strided(size, stride, dtype=dtype, device=_META))  # type: ignore[arg-type]
    if size is None:
        return given[of]
    meta = _meta_of(given[of])
    return Weightless((meta if meta.dtype == dtype else meta.view(dtype)).as_strided(size, stride, offset))  # type: ignore[arg-type]


def _described(value: Any) -> Any:
    """All of an argument that decides what its operation gives, as something to look up."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return value.__class__, value  # 1, 1.0 and True are one key else


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: Iterator[Tensor]) -> Any:
    """The operation on the meta device. `metas`: what stands for its tensors, in their order."""

    def down(value: Any) -> Any:
        return next(metas) if isinstance(value, Tensor) else value

    args, kwargs = _swap(args, down), {name: _each(value, down) for name, value in kwargs.items()}
    if _takes_device(func):
        kwargs["device"] = _META
    for name in ("generator", "pin_memory"):
        if kwargs.get(name) is not None:
            kwargs[name] = None
    return func(*args, **kwargs)


def _meta_of(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Weightless):
        return tensor.meta
    return (
        tensor
        if tensor.is_meta
        else torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)
    )


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" and argument.kwarg_only for argument in func._schema.arguments)


def _bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of the results of an operation on real tensors alone; 0 where they depend on the numbers, so that they have to be
    made.
    """
    try:
        made = _on_meta(func, args, kwargs, map(_meta_of, _tensors(args, kwargs)))
    # no meta kernel: its result depends on numbers; or one that asks for them
    except (NotImplementedError, RuntimeError):
        return 0
    return sum(t.numel() * t.element_size() for t in flat((made,)) if isinstance(t, Tensor))


def flat(values: Iterable[Any]) -> list[Any]:
    """Arguments or results of an operation, with those inside its lists. (torch's pytrees would take half of all the
    time.)
    """
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += value
        else:
            found.append(value)
    return found


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in flat((*args, *kwargs.values())) if isinstance(value, Tensor)]


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _each(value: Any, change: Any) -> Any:
    return type(value)(map(change, value)) if type(value) in (list, tuple) else change(value)


def _swap(args: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    return tuple([_each(value, change) for value in args])


def _off_meta(value: Any) -> Any:
    return _CPU if isinstance(value, torch.device) and value.type == "meta" else value


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The indices with boolean masks as the positions that they mean, as the kernels do it: only a real mask tells how
    many.
    """
    found: list[Tensor | None] = []
    for index in indices:
        real_mask = index is not None and index.dtype in _BOOLEAN and not isinstance(index, Weightless)
        found += index.nonzero().unbind(1) if real_mask else [index]  # type: ignore[union-attr]
    return found


def without_memory(module: nn.Module) -> list[Tensor]:
    """Replace trained parameters and buffers, in place, by weightless ones; shared ones stay shared. Returns all that
    operations will see of the module's own: those, and the frozen parameters."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    held: dict[int, Tensor] = {}

    def weightless(old: Tensor) -> Tensor:
        if id(old) not in made:
            new: Tensor = Weightless(old)
            made[id(old)] = (old, nn.Parameter(new, requires_grad=True) if isinstance(old, nn.Parameter) else new)
        return made[id(old)][1]

    for child in module.modules():
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if not isinstance(tensor, Weightless) and (
                    tensor.requires_grad or not isinstance(tensor, nn.Parameter)
                ):
                    tensor = own[name] = weightless(tensor)  # type: ignore[assignment]
                held[id(tensor)] = tensor
    return list(held.values())
