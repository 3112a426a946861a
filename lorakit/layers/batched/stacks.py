"""Factors of many adapters stacked, one stack for each routed layer, for batches that need no gradients (see `routes`).

A stack is a buffer with spare room: A [capacity, in] and s · Bᵀ [capacity, out], in the activations' precision. An
adapter that a batch names for the first time is written into a gap, which copies its own factors and no others. It
stays there, so that a mix that changes costs nothing while all that it names are in. When a stack may not grow any
more, the adapters that were named least recently make room.
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

# All stacks of a model together hold at most this many bytes, or EXCESS times what one batch needs, if that is more;
# and no more than SPARE times what is attached. Writing an adapter in takes longer than a step's use of it (512 -> 512,
# rank 24, fp32, one EPYC core: 82 µs a layer against 207 for 28 rows of four adapters), so the adapters that take turns
# should all fit: 400 of ranks 4 to 64 on eight layers of width 512 (`lorakit bench mixed`) are 3.1 GB.
STACK_BYTES = 4 << 30
EXCESS = 2
# A stack is made with room for this many times the ranks attached to its layer. On a CPU, memory that was never written
# to is not taken from the machine; and one in three adapters attached finds room without the others being written
# again.
SPARE = 1.5

Places = dict[str, tuple[int, int]]  # child -> (its first rank, the one after its last)

_version = operator.attrgetter("_version")


class Layout:
    """Where adapters lie in a stack. Never changed; layers whose stacks are alike hold the same one, so that it need
    not be compared.
    """

    def __init__(self, capacity: int, places: Places):
        self.capacity, self.places = capacity, places

    def gap(self, rank: int) -> int | None:
        """Where so many ranks fit: the first gap, so that the buffer's end stays untouched for long."""
        end = 0
        for start, stop in sorted(self.places.values()):
            if start - end >= rank:
                return end
            end = stop
        return end if self.capacity - end >= rank else None


class Held:
    """One adapter's pair as a stack holds it, and what tells whether the parameters it is made of still are what they
    were then.
    """

    __slots__ = ("addresses", "counts", "parameters", "registered", "versions")

    def __init__(self, update: LiveUpdate):
        self.registered = update._parameters
        self.parameters = cast("list[Tensor]", list(update._parameters.values()))  # a pair has all of its parameters
        # Not believed twice: inference tensors, which do not count their changes, and what is trained, as some
        # optimizers write without counting.
        self.counts = not any(p.is_inference() or p.requires_grad for p in self.parameters)
        self.versions = list(map(_version, self.parameters)) if self.counts else []
        self.addresses = list(map(Tensor.data_ptr, self.parameters))


class Uses:
    """Some adapters of a stack, and whether it holds them as they are now. All at once: asking one by one takes five
    times as long.
    """

    def __init__(self, stack: Stack, held: Sequence[Held]):
        def joined(lists: Iterable[list]) -> list:
            return list(itertools.chain.from_iterable(lists))

        self.stack, self.layout = stack, stack.layout
        self.counts = all(h.counts for h in held)
        self.registered = [h.registered for h in held]
        self.parameters: list[Tensor] = joined(h.parameters for h in held)
        self.versions = joined(h.versions for h in held)
        self.addresses = joined(h.addresses for h in held)

    def valid(self) -> bool:
        """Whether they still have their places, and are the same parameters, not written to, not moved."""
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
    """Adapters side by side for matrix products, those of equal rank next to each other (see
    `ops.batched.schedule`).
    """

    def __init__(self, layout: Layout, children: Iterable[str], device: torch.device):
        places = layout.places
        self.children = sorted(children, key=lambda c: (places[c][1] - places[c][0], places[c][0]))
        spans = [places[c] for c in self.children]
        self.ranks = [stop - start for start, stop in spans]
        adjoin = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        self.take: slice | Tensor = slice(spans[0][0], spans[-1][1])
        if not adjoin:
            self.take = torch.tensor([j for span in spans for j in range(*span)], device=device)


class Stack:
    """One layer's buffer. Plain tensors, without gradients."""

    def __init__(self, layout: Layout, size_in: int, size_out: int, like: Tensor):
        with torch.inference_mode(False):  # it outlives the mode of the batch that makes it
            self.A = torch.empty(layout.capacity, size_in, dtype=like.dtype, device=like.device)
            self.Bt = torch.empty(layout.capacity, size_out, dtype=like.dtype, device=like.device)
        self.layout, self.detached = layout, 0  # `detached`: ranks that were detached since, less those attached
        self.held: dict[str, Held] = {}
        self._ordered: tuple[Order, Tensor, Tensor] | None = None
        self._pieces: tuple[Schedule, list[stacked.Piece]] | None = None

    def fits(self, y: Tensor) -> bool:
        return self.A.dtype == y.dtype and self.A.device == y.device

    def stale(self, children: Iterable[str]) -> list[str]:
        """Those whose factors are not in it, or have changed since."""
        return [c for c in children if c not in self.held or not Uses(self, [self.held[c]]).valid()]

    def write(self, child: str, update: LiveUpdate, parts: tuple[bool, ...]) -> None:
        """Copy an adapter's pair to its place. `parts`: the layer's, where B is packed."""
        place, pair = slice(*self.layout.places[child]), update.pair()
        assert pair is not None
        with torch.no_grad():
            B = expand_packed(pair.B, parts) if pair.B.dim() == 3 else pair.B
            self.A[place] = pair.A
            self.Bt[place] = B.T * pair.scale
        self.held[child] = Held(update)
        self._ordered = self._pieces = None

    def move(self, layout: Layout) -> None:
        """Forget the adapters that this layout has no more, or elsewhere."""
        before = self.layout.places
        self.held = {c: held for c, held in self.held.items() if layout.places.get(c) == before[c]}
        self.layout, self._ordered, self._pieces = layout, None, None

    def ordered(self, order: Order) -> tuple[Tensor, Tensor]:
        """A and s · Bᵀ of these adapters, side by side: a part of the buffer,
        or a copy that is kept for the next step.
        """
        if self._ordered is None or self._ordered[0] is not order:
            take = order.take
            A, Bt = (t[take] if isinstance(take, slice) else t.index_select(0, take) for t in (self.A, self.Bt))
            self._ordered = order, A, Bt
        return self._ordered[1:]

    def pieces(self, how: Schedule, order: Order | None) -> list[stacked.Piece]:
        """Each chunk's factors, from the buffer as it is or from adapters side by side."""
        if self._pieces is None or self._pieces[0] is not how:
            A, Bt = (self.A, self.Bt) if order is None else self.ordered(order)
            self._pieces = how, stacked.pieces(A, Bt, how)
        return self._pieces[1]


class Stacks:
    """The stacks of a model's layers."""

    def __init__(self) -> None:
        self.of: dict[LoraLayer, Stack] = {}
        self._layouts: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
        self._named: dict[str, None] = {}  # children, that of the oldest batch first
        # what a layer worked out for this batch, for the next one with the same stack
        self._moves: dict[tuple, Layout | None] = {}
        self._width: int | None = None  # in + out of all routed layers together

    def begin(self, children: Iterable[str]) -> None:
        """A batch that names these adapters."""
        self._moves.clear()
        for child in children:
            self._named.pop(child, None)
            self._named[child] = None

    def uses(self, layer: LoraLayer, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]) -> Uses:
        """The layer's stack, with these adapters in it as they are now.
        `layers`: all that are routed, for the bound.
        """
        stack = self.of.get(layer)
        if stack is not None and not stack.fits(y):
            stack = None
        held = [] if stack is None else [stack.held[c] for c in children if c in stack.held]
        if stack is not None and len(held) == len(children):
            uses = Uses(stack, held)
            if uses.valid():
                return uses
        stack = self._filled(layer, stack, children, y, layers)
        return Uses(stack, [stack.held[c] for c in children])

    def _filled(
        self, layer: LoraLayer, stack: Stack | None, children: Sequence[str], y: Tensor, layers: Iterable[LoraLayer]
    ) -> Stack:
        """The stack, or a new one, after what is missing or has changed was written."""
        modules: Mapping[str, LiveUpdate] = layer._modules
        stale = list(children) if stack is None else stack.stale(children)
        ranks = {c: modules[c].width for c in stale}
        layout = self._with_room(layer, stack.layout, ranks, children, y, layers) if stack is not None else None
        if stack is None or layout is None:
            self.of.pop(layer, None)  # freed before the next one is made
            stale, ranks = list(children), {c: modules[c].width for c in children}
            layout = self._fresh(self._capacity(layer, sum(ranks.values()), y, layers), ranks)
            stack = self.of[layer] = Stack(layout, *_sizes(layer), y)
        elif layout is not stack.layout:
            stack.move(layout)
        for child in stale:
            stack.write(child, modules[child], getattr(layer, "lora_parts", ()))
        return stack

    def forget(self, layer: LoraLayer, child: str, rank: int, last: bool) -> None:
        """An adapter was detached from the layer. `last`: no other is left there."""
        self._named.pop(child, None)
        self._width = None
        stack = self.of.get(layer)
        if stack is None:
            return
        stack.detached += rank
        if last or 2 * stack.detached > stack.layout.capacity:
            del self.of[layer]  # most of it is room for adapters that are gone
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
        """An adapter was attached to the layer."""
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
        """The layout with places for these as well; others may have to go, but none of `children`. None if that gives
        no room.
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
                return None  # more is attached than when it was made
            while start is None and oldest:
                del planned.places[oldest.pop(0)]
                start = planned.gap(rank)
            if start is None:
                return None
            planned.places[child] = (start, start + rank)
        return layout if planned.places == layout.places else self._shared(planned.capacity, planned.places)

    def _fresh(self, capacity: int, ranks: Mapping[str, int]) -> Layout:
        places, end = {}, 0
        for child in sorted(ranks, key=ranks.__getitem__):  # equal ranks side by side, see `Order`
            places[child] = (end, end + ranks[child])
            end += ranks[child]
        return self._shared(capacity, places)

    def _shared(self, capacity: int, places: Places) -> Layout:
        layout = Layout(capacity, places)
        return self._layouts.setdefault((capacity, frozenset(places.items())), layout)

    def _capacity(self, layer: LoraLayer, needed: int, y: Tensor, layers: Iterable[LoraLayer]) -> int:
        """How many ranks a new stack of this layer may hold, for a batch that needs so many."""
        children: Iterable[object] = layer._modules.values()
        attached = sum([u.width for u in children if isinstance(u, LiveUpdate)])
        if self._width is None:
            self._width = sum([sum(_sizes(each)) for each in layers if each.lora_kind == "linear"])
        bound = STACK_BYTES // (self._width * y.element_size())
        return min(int(SPARE * attached), max(bound, EXCESS * needed))


def _sizes(layer: LoraLayer) -> tuple[int, int]:
    """(in, out)"""
    return layer.lora_sizes()
