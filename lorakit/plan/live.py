"""Which tensors are alive at each operation, in bytes, by what they are for; and the most there were in each stretch of
the work.

Every storage that an operation returns is noted at birth with the purpose of the moment, and taken off when the last
tensor that uses it is gone. Views and in-place results share a storage, which counts once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .weightless import Weightless, flat

_aten = torch.ops.aten

SMALL = "small blocks"  # kept beside the purposes: bytes in storages that a C library takes from its heap
HEAP_BLOCK = 32 << 20  # glibc's largest mmap threshold: larger ones never come from there


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


# torch's table has the matrix products and the GPU's attention; these are the CPU's.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, Weightless) else tensor).untyped_storage()


class Live(TorchDispatchMode):
    """Inside this mode storages are counted. `purpose` and `stretch` are set from outside as the work goes on."""

    def __init__(self, present: Iterable[Tensor] = (), through: TorchDispatchMode | None = None) -> None:
        """`present`: tensors that were there before; their storages, and so their views, are not counted. `through`: a
        mode that operations are given to, as if this one were inside it (two modes on torch's stack cost twice as
        much)."""
        super().__init__()
        self._through = through
        self.purpose, self.stretch = "working", "forward"
        self.bytes: dict[str, int] = {}  # alive now, by purpose
        self.peaks: dict[str, dict[str, int]] = {}  # at each stretch's largest moment, by purpose
        self.flops = 0
        self._alive: dict[int, tuple[str, int, weakref.ref]] = {}
        self._now = 0
        self._most: dict[str, int] = {}
        self._present = {_storage(t)._cdata: t for t in present}  # kept, so that no key is used twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `Shapes`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._through is None:
            out = func(*args, **(kwargs or {}))
        else:
            out = self._through.__torch_dispatch__(func, types, args, kwargs)
        for leaf in flat((out,)):
            if isinstance(leaf, Tensor):
                self.note(leaf, self.purpose)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def note(self, tensor: Tensor, purpose: str) -> None:
        """Count the tensor's storage under `purpose`, if it is not counted yet."""
        storage = _storage(tensor)
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._alive and key not in self._present:
            self._alive[key] = (purpose, size, weakref.ref(storage, lambda _: self._gone(key)))
            self._add(purpose, size)

    def rename(self, tensor: Tensor, purpose: str) -> None:
        """Count the tensor's storage under another purpose."""
        key = _storage(tensor)._cdata
        if key in self._alive:
            before, size, ref = self._alive[key]
            self._alive[key] = (purpose, size, ref)
            self._now -= size
            self.bytes[before] -= size
            self.bytes[SMALL] -= size if size < HEAP_BLOCK else 0
            self._add(purpose, size)

    def _add(self, purpose: str, size: int) -> None:
        self._now += size
        self.bytes[purpose] = self.bytes.get(purpose, 0) + size
        self.bytes[SMALL] = self.bytes.get(SMALL, 0) + (size if size < HEAP_BLOCK else 0)
        if self._now > self._most.get(self.stretch, -1):
            self._most[self.stretch] = self._now
            self.peaks[self.stretch] = dict(self.bytes)

    def _gone(self, key: int) -> None:
        purpose, size, _ = self._alive.pop(key)
        self._now -= size
        self.bytes[purpose] -= size
        self.bytes[SMALL] -= size if size < HEAP_BLOCK else 0
