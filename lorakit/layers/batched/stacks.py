"""Stack the factors of many adapters, one stack per routed layer, for batches that need no gradients (see `routes`).

A stack is a buffer with spare room: A [capacity, in] and s · Bᵀ [capacity, out], in the activations' precision. When a
batch uses an adapter for the first time, its factors are copied into a gap, and no others are moved. It stays there, so
changing the mix costs nothing while all its adapters are in the stack. When a stack may not grow further, the least
recently used adapters are evicted.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...ops.batched import stacked
from ...ops.batched.schedule import Schedule, Span
from ...ops.packed import expand_packed
from ..updates.update import LiveUpdate

if TYPE_CHECKING:
    from ..layer import LoraLayer
    from ..updates.update import Pair

# All stacks of a model together take at most this many bytes, or EXCESS times what one batch needs, if that is more;
# and at most SPARE times what is attached. Writing an adapter takes longer than its use in a step (512 -> 512, rank 24,
# fp32, one EPYC core: 82 µs per layer against 207 for 28 rows of four adapters), so all adapters in use should fit: 400
# of ranks 4 to 64 on eight layers of width 512 (`lorakit bench mixed`) are 3.1 GB.
STACK_BYTES = 4 << 30
EXCESS = 2
# A stack has room for this many times the ranks attached to its layer, so that half as many again can be attached
# without writing the others again. On a CPU, memory that was never written to is not allocated.
SPARE = 1.5

_version = operator.attrgetter("_version")


class Layout:
    """Where each adapter is in a stack. `capacity`: in ranks; `spans`: child -> its ranks.

    Immutable, and shared by layers with equal stacks, so that comparing identities is enough.
    """

    def __init__(self, capacity: int, spans: dict[str, Span]):
        self.capacity, self.spans = capacity, spans

    def gap(self, rank: int) -> int | None:
        """Return the start of the first gap of `rank` ranks, which keeps the buffer's end unused; None without one."""
        end = 0
        for start, stop in sorted(self.spans.values()):
            if start - end >= rank:
                return end
            end = stop
        return end if self.capacity - end >= rank else None


class Snapshot:
    """The parameters of an adapter's pair when it was written into a stack, to detect whether they have changed.
    `gained`: a pair with a gain, which depends on the layer's weight too, and is replaced when anything has changed.
    """

    __slots__ = ("addresses", "counts", "gained", "parameters", "registered", "versions")

    def __init__(self, update: LiveUpdate, pair: Pair):
        self.gained = (update, pair) if pair.gain is not None else None
        # None of a pair's is None. A frozen start is in buffers.
        self.registered: list[Mapping[str, Any]] = [update._parameters, *([update._buffers] if update._buffers else [])]
        self.parameters = cast("list[Tensor]", [t for each in self.registered for t in each.values()])
        # Never trusted: inference tensors, which have no version counter, and trained parameters, since some optimizers
        # write without increasing it.
        self.counts = not any(p.is_inference() or p.requires_grad for p in self.parameters)
        self.versions = list(map(_version, self.parameters)) if self.counts else []
        self.addresses = list(map(Tensor.data_ptr, self.parameters))


class Values:
    """The parameters of several snapshots. They are compared all at once: one by one takes five times as long."""

    def __init__(self, snapshots: Sequence[Snapshot]):
        def joined(lists: Iterable[list]) -> list:
            return list(itertools.chain.from_iterable(lists))

        self.counts = all(s.counts for s in snapshots)
        self.registered = joined(s.registered for s in snapshots)
        self.parameters: list[Tensor] = joined(s.parameters for s in snapshots)
        self.versions = joined(s.versions for s in snapshots)
        self.addresses = joined(s.addresses for s in snapshots)

    def unchanged(self) -> bool:
        """Whether the parameters are the same tensors, with the same values."""
        return (
            self.counts
            and all(
                map(operator.is_, itertools.chain.from_iterable(map(dict.values, self.registered)), self.parameters)
            )
            and list(map(_version, self.parameters)) == self.versions
            and list(map(Tensor.data_ptr, self.parameters)) == self.addresses
        )


class Uses:
    """Adapters of a stack that one batch uses. fixed: see `Stacks`."""

    def __init__(self, layer: LoraLayer, stack: Stack, children: Iterable[str], fixed: bool):
        self.layer, self.stack, self.layout = layer, stack, stack.layout
        snapshots = {c: stack.snapshots[c] for c in children}
        gained = {c: s.gained for c, s in snapshots.items() if s.gained is not None}
        self.gained = list(gained.values())
        self.gains: dict[str, Tensor] = {c: pair.gain for c, (_, pair) in gained.items() if pair.gain is not None}
        self.values = None if fixed else Values(list(snapshots.values()))

    def valid(self) -> bool:
        """Whether the stack still has these adapters at the same ranks, with the current values of their parameters."""
        return (
            self.stack.layout is self.layout
            and (self.values is None or self.values.unchanged())
            # Also of fixed adapters: a gain is for one weight, and a row may use another adapter's (`saved_rows`).
            and all(update.pair(self.layer) is pair for update, pair in self.gained)
        )


class Order:
    """An order of adapters for matrix products, with equal ranks adjacent (see `ops.batched.schedule`)."""

    def __init__(self, layout: Layout, children: Iterable[str], device: torch.device):
        def rank_and_start(child: str) -> tuple[int, int]:
            start, stop = layout.spans[child]
            return stop - start, start

        self.children = sorted(children, key=rank_and_start)
        spans = [layout.spans[c] for c in self.children]
        self.ranks = [stop - start for start, stop in spans]
        contiguous = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        self.take: slice | Tensor = slice(spans[0][0], spans[-1][1])  # the ranks to take from the buffer
        if not contiguous:
            self.take = torch.tensor([j for span in spans for j in range(*span)], device=device)


class Stack:
    """One layer's buffer: plain tensors without gradients."""

    def __init__(self, layout: Layout, size_in: int, size_out: int, like: Tensor):
        with torch.inference_mode(False):  # it outlives the batch, which may run in inference mode
            self.A = torch.empty(layout.capacity, size_in, dtype=like.dtype, device=like.device)
            self.Bt = torch.empty(layout.capacity, size_out, dtype=like.dtype, device=like.device)
        self.dtype, self.device = like.dtype, like.device
        self.layout, self.detached = layout, 0  # `detached`: ranks detached since, minus those attached
        self.snapshots: dict[str, Snapshot] = {}
        self._ordered: tuple[Order, Tensor, Tensor] | None = None
        self._chunk_factors: tuple[Schedule, list[stacked.ChunkFactors]] | None = None

    def fits(self, y: Tensor) -> bool:
        """Whether it has y's dtype and device."""
        return self.dtype == y.dtype and self.device == y.device

    def stale(self, layer: LoraLayer, children: Iterable[str], fixed: bool) -> list[str]:
        """Return the adapters whose factors are missing or have changed since they were written."""
        return [c for c in children if c not in self.snapshots or not Uses(layer, self, [c], fixed).valid()]

    def write(self, child: str, layer: LoraLayer) -> None:
        """Copy the pair of an adapter on this layer into the buffer."""
        update: LiveUpdate = layer._modules[child]
        parts: tuple[bool, ...] = getattr(layer, "lora_parts", ())
        with torch.no_grad():
            ranks, pair = slice(*self.layout.spans[child]), update.pair(layer)
            assert pair is not None
            B = expand_packed(pair.B, parts) if pair.B.dim() == 3 else pair.B
            self.A[ranks] = pair.A
            self.Bt[ranks] = B.T * pair.scale
        self.snapshots[child] = Snapshot(update, pair)
        self._ordered = self._chunk_factors = None

    def move(self, layout: Layout) -> None:
        """Change the layout, and forget the adapters that it lacks or has at other ranks."""
        before = self.layout.spans
        self.snapshots = {c: s for c, s in self.snapshots.items() if layout.spans.get(c) == before[c]}
        self.layout, self._ordered, self._chunk_factors = layout, None, None

    def ordered(self, order: Order) -> tuple[Tensor, Tensor]:
        """Return A and s · Bᵀ of these adapters in this order: a view of the buffer, or a cached copy."""
        if self._ordered is None or self._ordered[0] is not order:
            take = order.take
            A, Bt = (t[take] if isinstance(take, slice) else t.index_select(0, take) for t in (self.A, self.Bt))
            self._ordered = order, A, Bt
        return self._ordered[1:]

    def chunk_factors(self, schedule: Schedule, order: Order | None) -> list[stacked.ChunkFactors]:
        """Return each chunk's factors, from the buffer or, with an order, from `ordered`."""
        if self._chunk_factors is None or self._chunk_factors[0] is not schedule:
            A, Bt = (self.A, self.Bt) if order is None else self.ordered(order)
            self._chunk_factors = schedule, stacked.chunk_factors(A, Bt, schedule)
        return self._chunk_factors[1]


class Stacks:
    """The stacks of a model's layers.

    `expected`: how many adapters may be attached at once, 0 if that is not known. `fixed`: they do not change while
    they are attached, so that a batch need not compare them with what was written (about 5 % of a step of 32 rows with
    8 adapters at width 256).
    """

    def __init__(self, expected: int = 0, fixed: bool = False) -> None:
        self.expected, self.fixed = expected, fixed
        self.of: dict[LoraLayer, Stack] = {}
        self._layouts: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
        self._named: dict[str, None] = {}  # children, least recently used first
        self._moves: dict[tuple, Layout | None] = {}  # layouts computed for this batch, shared by equal layers
        self._width: int | None = None  # Σ (in + out) over all routed layers

    def begin(self, children: Iterable[str]) -> None:
        """Begin a batch that uses these adapters."""
        self._moves.clear()
        for child in children:
            self._named.pop(child, None)
            self._named[child] = None

    def has(self, layer: LoraLayer, children: frozenset[str]) -> bool:
        """Whether all these adapters are in the layer's stack, and so pairs on this layer."""
        stack = self.of.get(layer)
        return stack is not None and children <= stack.snapshots.keys()

    def uses(self, layer: LoraLayer, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]) -> Uses:
        """Return the layer's stack with these adapters' current values. `layers`: all routed ones, for the bound."""
        stack = self.of.get(layer)
        if stack is not None and not stack.fits(y):
            stack = None
        if stack is not None and all(c in stack.snapshots for c in children):
            uses = Uses(layer, stack, children, self.fixed)
            if uses.valid():
                return uses
        stack = self._updated(layer, stack, children, y, layers)
        return Uses(layer, stack, children, self.fixed)

    def _updated(
        self, layer: LoraLayer, stack: Stack | None, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]
    ) -> Stack:
        """Write missing and changed adapters into the stack, or into a new one. Returns it."""
        modules: Mapping[str, LiveUpdate] = layer._modules
        stale = list(children) if stack is None else stack.stale(layer, children, self.fixed)
        ranks = {c: modules[c].width for c in stale}
        layout = None
        if stack is not None:
            key = (stack.layout, tuple(ranks.items()), tuple(children))
            if key not in self._moves:
                self._moves[key] = self._with_room(layer, stack.layout, ranks, children, y, layers)
            layout = self._moves[key]
        if stack is None or layout is None:
            self.of.pop(layer, None)  # free the old one before allocating the new one
            stale, ranks = list(children), {c: modules[c].width for c in children}
            layout = self._fresh(self._capacity(layer, sum(ranks.values()), y, layers), ranks)
            stack = self.of[layer] = Stack(layout, *_sizes(layer), y)
        elif layout is not stack.layout:
            stack.move(layout)
        for child in stale:
            stack.write(child, layer)
        return stack

    def forget(self, layer: LoraLayer, child: str, rank: int, last: bool) -> None:
        """Note that an adapter was detached from the layer. `last`: whether it was the last one there."""
        self._named.pop(child, None)
        self._width = None
        stack = self.of.get(layer)
        if stack is None:
            return
        stack.detached += rank
        if last or 2 * stack.detached > stack.layout.capacity:
            del self.of[layer]  # most of its room was for adapters that are now detached
        elif child in stack.layout.spans:
            key = (stack.layout, child)
            if key not in self._moves:
                self._moves[key] = self._shared(
                    stack.layout.capacity, {c: span for c, span in stack.layout.spans.items() if c != child}
                )
            moved = self._moves[key]
            assert moved is not None
            stack.move(moved)

    def joined(self, layer: LoraLayer, rank: int) -> None:
        """Note that an adapter was attached to the layer."""
        self._width = None
        if layer in self.of:
            self.of[layer].detached -= rank

    def _with_room(
        self,
        layer: LoraLayer,
        layout: Layout,
        ranks: Mapping[str, int],
        children: Sequence[str],
        y: Tensor,
        layers: Iterable[LoraLayer],
    ) -> Layout | None:
        """Return the layout with room for adapters of these `ranks` (child -> rank) too; None if there is none.

        Other adapters may be evicted for it, but none of `children`.
        """
        modules = layer._modules
        same = {
            c: (start, stop) for c, (start, stop) in layout.spans.items() if ranks.get(c, stop - start) == stop - start
        }
        planned, kept = Layout(layout.capacity, same), set(children)
        oldest = [c for c in self._named if c in same and c not in kept]
        for child, rank in sorted(((c, r) for c, r in ranks.items() if c not in same), key=operator.itemgetter(1)):
            start = planned.gap(rank)
            if start is None and layout.capacity < self._capacity(
                layer, sum(modules[c].width for c in children), y, layers
            ):
                return None  # more is attached than when it was created
            while start is None and oldest:
                del planned.spans[oldest.pop(0)]
                start = planned.gap(rank)
            if start is None:
                return None
            planned.spans[child] = (start, start + rank)
        return layout if planned.spans == layout.spans else self._shared(planned.capacity, planned.spans)

    def _fresh(self, capacity: int, ranks: Mapping[str, int]) -> Layout:
        spans, end = {}, 0
        for child in sorted(ranks, key=ranks.__getitem__):  # equal ranks adjacent, see `Order`
            spans[child] = (end, end + ranks[child])
            end += ranks[child]
        return self._shared(capacity, spans)

    def _shared(self, capacity: int, spans: dict[str, Span]) -> Layout:
        layout = Layout(capacity, spans)
        return self._layouts.setdefault((capacity, frozenset(spans.items())), layout)

    def _capacity(self, layer: LoraLayer, needed: int, y: Tensor, layers: Iterable[LoraLayer]) -> int:
        """Return the number of ranks for a new stack of this layer, for a batch that needs `needed`."""
        widths = [u.width for u in layer._modules.values() if isinstance(u, LiveUpdate)]
        attached = sum(widths)
        if self.expected > len(widths) and y.device.type == "cpu":
            # A new stack is written with all adapters of the batch: while 32 adapters of 20 MB came one by one, four
            # steps took 60 to 160 ms longer for it (512 x 8, fp32, one core). Room that is not written to is free.
            attached = attached * self.expected // len(widths)
        if self._width is None:
            self._width = sum([sum(_sizes(each)) for each in layers if each.lora_kind == "linear"])
        bound = STACK_BYTES // (self._width * y.element_size())
        return min(int(SPARE * attached), max(bound, EXCESS * needed))


def _sizes(layer: LoraLayer) -> tuple[int, int]:
    """Return (in, out)."""
    return layer.lora_sizes()
