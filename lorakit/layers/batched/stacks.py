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
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...ops.batched import stacked
from ...ops.batched.schedule import Schedule
from ...ops.packed import expand_packed
from ..updates.update import LiveUpdate

if TYPE_CHECKING:
    from ..layer import LoraLayer

# All stacks of a model together take at most this many bytes, or EXCESS times what one batch needs, if that is more;
# and at most SPARE times what is attached. Writing an adapter takes longer than its use in a step (512 -> 512, rank 24,
# fp32, one EPYC core: 82 µs per layer against 207 for 28 rows of four adapters), so all adapters in use should fit: 400
# of ranks 4 to 64 on eight layers of width 512 (`lorakit bench mixed`) are 3.1 GB.
STACK_BYTES = 4 << 30
EXCESS = 2
# A stack has room for this many times the ranks attached to its layer, so that half as many again can be attached
# without writing the others again. On a CPU, memory that was never written to is not allocated.
SPARE = 1.5

Places = dict[str, tuple[int, int]]  # child -> (its first rank, one past its last)

_version = operator.attrgetter("_version")


class Layout:
    """The positions of adapters in a stack. Immutable, and shared by layers with equal stacks, so that identity
    suffices for comparing.
    """

    def __init__(self, capacity: int, places: Places):
        self.capacity, self.places = capacity, places

    def gap(self, rank: int) -> int | None:
        """Return the start of the first gap of `rank` ranks, which keeps the buffer's end unused; None without one."""
        end = 0
        for start, stop in sorted(self.places.values()):
            if start - end >= rank:
                return end
            end = stop
        return end if self.capacity - end >= rank else None


class Snapshot:
    """The parameters of an adapter's pair when it was written into a stack, to detect whether they have changed."""

    __slots__ = ("addresses", "counts", "parameters", "registered", "versions")

    def __init__(self, update: LiveUpdate):
        self.registered = update._parameters
        self.parameters = cast("list[Tensor]", list(update._parameters.values()))  # none of a pair's is None
        # Never trusted: inference tensors, which have no version counter, and trained parameters, since some optimizers
        # write without increasing it.
        self.counts = not any(p.is_inference() or p.requires_grad for p in self.parameters)
        self.versions = list(map(_version, self.parameters)) if self.counts else []
        self.addresses = list(map(Tensor.data_ptr, self.parameters))


class Uses:
    """Adapters of a stack that one batch uses. They are checked all at once: one by one takes five times as long."""

    def __init__(self, stack: Stack, snapshots: Sequence[Snapshot]):
        def joined(lists: Iterable[list]) -> list:
            return list(itertools.chain.from_iterable(lists))

        self.stack, self.layout = stack, stack.layout
        self.counts = all(s.counts for s in snapshots)
        self.registered = [s.registered for s in snapshots]
        self.parameters: list[Tensor] = joined(s.parameters for s in snapshots)
        self.versions = joined(s.versions for s in snapshots)
        self.addresses = joined(s.addresses for s in snapshots)

    def valid(self) -> bool:
        """Whether the stack still has these adapters in the same places with the current values of their parameters."""
        return (
            self.counts
            and self.stack.layout is self.layout
            and all(
                map(operator.is_, itertools.chain.from_iterable(map(dict.values, self.registered)), self.parameters)
            )
            and list(map(_version, self.parameters)) == self.versions
            and list(map(Tensor.data_ptr, self.parameters)) == self.addresses
        )


class Order:
    """An order of adapters for matrix products, with equal ranks adjacent (see `ops.batched.schedule`)."""

    def __init__(self, layout: Layout, children: Iterable[str], device: torch.device):
        places = layout.places
        self.children = sorted(children, key=lambda c: (places[c][1] - places[c][0], places[c][0]))
        spans = [places[c] for c in self.children]
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
        self.layout, self.detached = layout, 0  # `detached`: ranks detached since, minus those attached
        self.snapshots: dict[str, Snapshot] = {}
        self._ordered: tuple[Order, Tensor, Tensor] | None = None
        self._pieces: tuple[Schedule, list[stacked.Piece]] | None = None

    def fits(self, y: Tensor) -> bool:
        """Whether it has y's dtype and device."""
        return self.A.dtype == y.dtype and self.A.device == y.device

    def stale(self, children: Iterable[str]) -> list[str]:
        """Return the adapters whose factors are missing or have changed since they were written."""
        return [c for c in children if c not in self.snapshots or not Uses(self, [self.snapshots[c]]).valid()]

    def write(self, child: str, update: LiveUpdate, parts: tuple[bool, ...]) -> None:
        """Copy an adapter's pair into the buffer. `parts`: the layer's, for a packed B."""
        place, pair = slice(*self.layout.places[child]), update.pair()
        assert pair is not None
        with torch.no_grad():
            B = expand_packed(pair.B, parts) if pair.B.dim() == 3 else pair.B
            self.A[place] = pair.A
            self.Bt[place] = B.T * pair.scale
        self.snapshots[child] = Snapshot(update)
        self._ordered = self._pieces = None

    def move(self, layout: Layout) -> None:
        """Change the layout, and forget the adapters that it lacks or has in another place."""
        before = self.layout.places
        self.snapshots = {c: s for c, s in self.snapshots.items() if layout.places.get(c) == before[c]}
        self.layout, self._ordered, self._pieces = layout, None, None

    def ordered(self, order: Order) -> tuple[Tensor, Tensor]:
        """Return A and s · Bᵀ of these adapters in this order: a view of the buffer, or a cached copy."""
        if self._ordered is None or self._ordered[0] is not order:
            take = order.take
            A, Bt = (t[take] if isinstance(take, slice) else t.index_select(0, take) for t in (self.A, self.Bt))
            self._ordered = order, A, Bt
        return self._ordered[1:]

    def pieces(self, schedule: Schedule, order: Order | None) -> list[stacked.Piece]:
        """Return each chunk's factors, from the buffer or, with an order, from `ordered`."""
        if self._pieces is None or self._pieces[0] is not schedule:
            A, Bt = (self.A, self.Bt) if order is None else self.ordered(order)
            self._pieces = schedule, stacked.pieces(A, Bt, schedule)
        return self._pieces[1]


class Stacks:
    """The stacks of a model's layers."""

    def __init__(self) -> None:
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

    def uses(self, layer: LoraLayer, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]) -> Uses:
        """Return the layer's stack with these adapters' current values. `layers`: all routed ones, for the bound."""
        stack = self.of.get(layer)
        if stack is not None and not stack.fits(y):
            stack = None
        snapshots = [] if stack is None else [stack.snapshots[c] for c in children if c in stack.snapshots]
        if stack is not None and len(snapshots) == len(children):
            uses = Uses(stack, snapshots)
            if uses.valid():
                return uses
        stack = self._updated(layer, stack, children, y, layers)
        return Uses(stack, [stack.snapshots[c] for c in children])

    def _updated(
        self, layer: LoraLayer, stack: Stack | None, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]
    ) -> Stack:
        """Write missing and changed adapters into the stack, or into a new one. Returns it."""
        modules: Mapping[str, LiveUpdate] = layer._modules
        stale = list(children) if stack is None else stack.stale(children)
        ranks = {c: modules[c].width for c in stale}
        layout = self._with_room(layer, stack.layout, ranks, children, y, layers) if stack is not None else None
        if stack is None or layout is None:
            self.of.pop(layer, None)  # free the old one before allocating the new one
            stale, ranks = list(children), {c: modules[c].width for c in children}
            layout = self._fresh(self._capacity(layer, sum(ranks.values()), y, layers), ranks)
            stack = self.of[layer] = Stack(layout, *_sizes(layer), y)
        elif layout is not stack.layout:
            stack.move(layout)
        for child in stale:
            stack.write(child, modules[child], getattr(layer, "lora_parts", ()))
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
        elif child in stack.layout.places:
            key = (stack.layout, child)
            if key not in self._moves:
                self._moves[key] = self._shared(
                    stack.layout.capacity, {c: p for c, p in stack.layout.places.items() if c != child}
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
        """Return the layout with places for `ranks` too, evicting others but none of `children`; None if there is no
        room.
        """
        key = (layout, tuple(ranks.items()), tuple(children))
        if key not in self._moves:
            self._moves[key] = self._planned(layer, layout, ranks, children, y, layers)
        return self._moves[key]

    def _planned(
        self,
        layer: LoraLayer,
        layout: Layout,
        ranks: Mapping[str, int],
        children: Sequence[str],
        y: Tensor,
        layers: Iterable[LoraLayer],
    ) -> Layout | None:
        modules = layer._modules
        same = {
            c: (start, stop) for c, (start, stop) in layout.places.items() if ranks.get(c, stop - start) == stop - start
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
                del planned.places[oldest.pop(0)]
                start = planned.gap(rank)
            if start is None:
                return None
            planned.places[child] = (start, start + rank)
        return layout if planned.places == layout.places else self._shared(planned.capacity, planned.places)

    def _fresh(self, capacity: int, ranks: Mapping[str, int]) -> Layout:
        places, end = {}, 0
        for child in sorted(ranks, key=ranks.__getitem__):  # equal ranks adjacent, see `Order`
            places[child] = (end, end + ranks[child])
            end += ranks[child]
        return self._shared(capacity, places)

    def _shared(self, capacity: int, places: Places) -> Layout:
        layout = Layout(capacity, places)
        return self._layouts.setdefault((capacity, frozenset(places.items())), layout)

    def _capacity(self, layer: LoraLayer, needed: int, y: Tensor, layers: Iterable[LoraLayer]) -> int:
        """Return the number of ranks for a new stack of this layer, for a batch that needs `needed`."""
        children: Iterable[object] = layer._modules.values()
        attached = sum([u.width for u in children if isinstance(u, LiveUpdate)])
        if self._width is None:
            self._width = sum([sum(_sizes(each)) for each in layers if each.lora_kind == "linear"])
        bound = STACK_BYTES // (self._width * y.element_size())
        return min(int(SPARE * attached), max(bound, EXCESS * needed))


def _sizes(layer: LoraLayer) -> tuple[int, int]:
    """Return (in, out)."""
    return layer.lora_sizes()
