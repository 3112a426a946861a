"""Track the bytes of live tensors by purpose at each operation, and their peak in each phase of a step.

Every storage that an operation returns is counted with the current purpose when it is created, and subtracted when its
last tensor is freed. Views and in-place results share a storage, which is counted once.
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

SMALL = "small blocks"  # counted besides the purposes: bytes of storages that the C library allocates on its heap
HEAP_BLOCK = 32 << 20  # glibc's largest mmap threshold: larger blocks are never on the heap


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


def _grouped(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """Count each row of a times the matrix of its group. If b is 2-D, the groups share its columns or rows."""
    shared = a.shape[-2] if a.dim() == b.dim() == 2 else a.shape[-1]
    return 2 * (a.numel() * b.shape[-1] if a.dim() == 2 or b.dim() == 3 else shared * a.shape[-2] * b.shape[-1])


# torch's registry has matrix products and the GPU's attention; add the CPU's attention and the products of experts.
_FLOPS = {
    **flop_registry,
    _aten._grouped_mm: _grouped,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, Weightless) else tensor).untyped_storage()


class Live(TorchDispatchMode):
    """A mode in which storages are counted. Its user sets `purpose` and `stretch` (the phase) as the step proceeds."""

    def __init__(self, present: Iterable[Tensor] = (), through: TorchDispatchMode | None = None) -> None:
        """`present`: existing tensors, whose storages and views are not counted. `through`: a mode to run operations
        in, as if this one were nested in it (two modes on torch's stack cost twice as much)."""
        super().__init__()
        self._through = through
        self.purpose, self.stretch = "working", "forward"
        self.bytes: dict[str, int] = {}  # of live tensors, by purpose
        self.peaks: dict[str, dict[str, int]] = {}  # the same at each stretch's peak
        self.flops = 0
        self._alive: dict[int, tuple[str, int, weakref.ref]] = {}
        self._now = 0
        self._most: dict[str, int] = {}
        self._present = {_storage(t)._cdata: t for t in present}  # held, so that no address is reused

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
        """Move the tensor's storage to another purpose."""
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
