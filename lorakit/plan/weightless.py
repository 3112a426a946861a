"""Run a model on shapes alone, without memory for weights, so that any machine can simulate a step of any size.

Trained parameters, and all that is computed from weights, are `Weightless`: tensors that report the CPU as their device
and have shape, dtype, strides and autograd, but no values. Each wraps a tensor on the meta device, on which torch's own
meta kernels run. Views share a meta storage, so it is known which tensors share memory. Frozen weights stay plain
parameters on the meta device, since layers check for that class (a quantized weight has another one). What does not
depend on weights (token ids, labels, positions, masks) stays real while it is small, since code reads its values: which
positions are trained, whether a mask is all ones. So the model, the layers and the loss run unchanged, on the kernels
that they would choose.

torch's own FakeTensorMode does the same and more (devices, symbolic sizes, a cache), at about six times the cost per
operation (a training step of the embedded model, 2 and 3 layers, LoRA: 1.2 to 1.6 s of CPU time against 0.26).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Real tensors are created up to this many bytes. A batch of ids, which must be real, has 8 bytes per token.
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
_GROUPED = getattr(_aten._grouped_mm, "default", None) if hasattr(_aten, "_grouped_mm") else None


class Weightless(Tensor):
    """A tensor without values. `meta`: the same tensor on the meta device; views share its storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Weightless:
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.size(), strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=_CPU
        )
        wrapper.meta = meta
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Weightless({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with Shapes():
            return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """A mode in which operations on weightless tensors, mixed with real ones, return weightless tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard costs more than this mode's own work

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


class _Argument(NamedTuple):
    """A result that is one of the tensor arguments, the one at this position."""

    position: int


class _Result(NamedTuple):
    """The layout of a new result. `view_of`: index of the tensor argument whose storage it shares, None for its own."""

    view_of: int | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


# Cached results, by operation and arguments. Many of torch's meta kernels are Python code and take 0.2 ms; a lookup
# takes a tenth of that. The type is that of the sequence of results, None for a single one.
_cache: dict[Any, tuple[type | None, list[_Argument | _Result | None]]] = {}


def _weightless(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on shapes. Its results are weightless; arguments that it returns are the same objects."""
    key = (func, *map(_key, args), *kwargs, *map(_key, kwargs.values()))
    tensors = _tensors(args, kwargs)
    if key not in _cache:
        metas = [_meta_of(tensor) for tensor in tensors]
        out = _on_meta(func, args, kwargs, iter(metas))
        kind = type(out) if type(out) in (list, tuple) else None
        _cache[key] = kind, [_layout(value, metas) for value in ((out,) if kind is None else out)]
    kind, layouts = _cache[key]
    results = [None if layout is None else _tensor_of(layout, tensors) for layout in layouts]
    return results[0] if kind is None else kind(results)


def _layout(value: Any, metas: list[Tensor]) -> _Argument | _Result | None:
    if not isinstance(value, Tensor):
        return None
    for index, meta in enumerate(metas):
        if meta is value:
            return _Argument(index)
    storage = value.untyped_storage()._cdata
    view_of = next((index for index, meta in enumerate(metas) if meta.untyped_storage()._cdata == storage), None)
    return _Result(view_of, tuple(value.size()), value.stride(), int(value.storage_offset()), value.dtype)


def _tensor_of(layout: _Argument | _Result, tensors: list[Tensor]) -> Tensor:
    if isinstance(layout, _Argument):
        return tensors[layout.position]
    view_of, size, stride, offset, dtype = layout
    if view_of is None:
        return Weightless(torch.empty_strided(size, stride, dtype=dtype, device=_META))
    meta = _meta_of(tensors[view_of])
    return Weightless((meta if meta.dtype == dtype else meta.view(dtype)).as_strided(size, stride, offset))


def _key(value: Any) -> Any:
    """Return a hashable description of an argument: all that the layout of the results depends on."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value.__class__, value  # otherwise 1, 1.0 and True would be the same key


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: Iterator[Tensor]) -> Any:
    """Run an operation on the meta device. `metas`: what replaces its tensors, in order."""

    def down(value: Any) -> Any:
        return next(metas) if isinstance(value, Tensor) else value

    args, kwargs = _swap(args, down), {name: _each(value, down) for name, value in kwargs.items()}
    if func is _GROUPED:
        return _grouped(*args, **kwargs)
    if _takes_device(func):
        kwargs["device"] = _META
    for name in ("generator", "pin_memory"):
        if kwargs.get(name) is not None:
            kwargs[name] = None
    return func(*args, **kwargs)


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Return the result, on meta, of the grouped product that MoE experts use: a[i] @ b[i] of each group i.

    torch's meta kernel asks for what GPUs do, bfloat16 and aligned rows; its CPU kernel takes all dtypes. A dimension
    that the groups share between them (2-D argument) has no axis of its own.
    """
    if a.dim() == 2 and b.dim() == 2:  # the sum over rows is split: the gradient of the weights
        assert offsets is not None
        size: tuple[int, ...] = (offsets.shape[0], a.shape[0], b.shape[1])
    else:
        size = (*a.shape[:-1], b.shape[-1]) if a.dim() == 2 or b.dim() == 3 else (a.shape[1], b.shape[1])
    return torch.empty(size, dtype=out_dtype or a.dtype, device=_META)


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
    """Return the size of the results of an operation on real tensors; 0 if it depends on their values.

    Such an operation must run on the real tensors.
    """
    try:
        out = _on_meta(func, args, kwargs, map(_meta_of, _tensors(args, kwargs)))
    # there is no meta kernel, since the result's shape depends on values, or it tried to read values
    except (NotImplementedError, RuntimeError):
        return 0
    return sum(t.numel() * t.element_size() for t in flat((out,)) if isinstance(t, Tensor))


def flat(values: Iterable[Any]) -> list[Any]:
    """Flatten the lists among an operation's arguments or results. (torch's pytrees would take half of the time.)"""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            leaves += value
        else:
            leaves.append(value)
    return leaves


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
    """Replace boolean masks among the indices by the positions they select, as the kernels do.

    A weightless mask stays: only a real one has values, and so a number of positions.
    """
    positions: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in _BOOLEAN and not isinstance(index, Weightless):
            positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions


def without_memory(module: nn.Module) -> list[Tensor]:
    """Replace trained parameters and buffers, in place, by weightless ones; tied ones stay tied. Returns all tensors of
    the module that operations will see: these, and the frozen parameters."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    tensors: dict[int, Tensor] = {}

    def weightless(old: Tensor) -> Tensor:
        if id(old) not in replaced:
            new: Tensor = Weightless(old)
            replaced[id(old)] = (old, nn.Parameter(new, requires_grad=True) if isinstance(old, nn.Parameter) else new)
        return replaced[id(old)][1]

    for child in module.modules():
        tables: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)  # a parameter stays a parameter
        for own in tables:
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if not isinstance(tensor, Weightless) and (
                    tensor.requires_grad or not isinstance(tensor, nn.Parameter)
                ):
                    tensor = own[name] = weightless(tensor)
                tensors[id(tensor)] = tensor
    return list(tensors.values())
