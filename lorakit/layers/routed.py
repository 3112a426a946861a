"""What an adapted module computes while each row of the batch has an adapter of its own (`lorakit.route`).

    y[n] = base(x)[n] + Σ_k w[n, k] · update_k(x[n])        w: [rows, adapters], a row of zeros for the base alone

`Routing` holds one batch's choices, and what the layers derive from them once and share. `Routes` holds what outlives a batch:
the layers, each layer's factors stacked in the activations' precision, and the last batches' routings.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StateError
from ..ops import mixed
from ..ops.blocks import expand_packed
from ..ops.cut import Cut, Row, cut
from ..ops.linear import add_low_rank, needs_plain
from ..ops.segments import Segments, add_segments, segments
from ..ops.shared_mask import mask_for
from .frozen import is_frozen_linear

if TYPE_CHECKING:
    from .layer import LoraFactors, LoraLayer

Choice = tuple[tuple[str, float], ...]  # (a child's name, its weight), ...; () is the base

# A layer's stack may hold this many times the ranks that a batch needs before it is built anew without the rest.
STACK_EXCESS = 2

_version = operator.attrgetter("_version")


class Group(NamedTuple):
    """The update of an adapter for each group of rows: A [G, r, in], B [G, out, r] (see `ops.projections`). None: none has one there."""

    A: Tensor | None
    B: Tensor | None
    scale: float
    dropout: float


class Layout:
    """The adapters of a stack and their ranks. Layers whose stacks are alike hold the same one, so that it need not be compared."""

    def __init__(self, adapters: tuple[tuple[str, int], ...]):
        self.adapters = adapters


class Stack:
    """The factors of some adapters on one layer, in one precision: A [ΣR, in] and scale · Bᵀ [ΣR, out]. Plain tensors, for decoding."""

    def __init__(self, layer: LoraLayer, children: Sequence[str], like: Tensor):
        modules = layer._modules  # type: ignore[attr-defined]
        self.children = sorted(children, key=lambda c: modules[c].A.shape[0])  # equal ranks side by side, see `ops.cut`
        self.factors: list[LoraFactors] = [modules[c] for c in self.children]
        self.ranks, downs, ups = [], [], []
        with torch.no_grad():
            for f in self.factors:
                B = expand_packed(f.B, layer.lora_parts) if f.B.dim() == 3 else f.B  # type: ignore[attr-defined]
                downs.append(f.A.to(like))
                ups.append((B.T * f.scale).to(like))
                self.ranks.append(B.shape[1])
            self.A, self.Bt = torch.cat(downs), torch.cat(ups)
        self.layout = Layout(tuple(zip(self.children, self.ranks, strict=True)))
        self._pieces: tuple[Cut, list[mixed.Piece]] | None = None
        self._parameters = self._now()
        # Not believed twice: inference tensors, which do not count their changes, and what is trained, as some optimizers write without counting.
        self._counts = not any(p.is_inference() or p.requires_grad for p in self._parameters)
        self._versions = list(map(_version, self._parameters)) if self._counts else []
        self._places = list(map(Tensor.data_ptr, self._parameters))

    def fits(self, y: Tensor) -> bool:
        return self.A.dtype == y.dtype and self.A.device == y.device

    def pieces(self, how: Cut) -> list[mixed.Piece]:
        if self._pieces is None or self._pieces[0] is not how:
            self._pieces = how, mixed.pieces(self.A, self.Bt, how)
        return self._pieces[1]

    def _now(self) -> list[Tensor]:
        return [p for f in self.factors for p in f._parameters.values()]  # type: ignore[misc]

    def valid(self) -> bool:
        """Whether the factors are still what was stacked: the same parameters, not written to, not moved."""
        kept = self._parameters
        return (
            self._counts
            and all(map(operator.is_, self._now(), kept))
            and list(map(_version, kept)) == self._versions
            and list(map(Tensor.data_ptr, kept)) == self._places
        )


class Routes:
    """What a model keeps between batches, until its adapters change."""

    def __init__(self, names: Mapping[LoraLayer, str]):
        self.names = names
        self.stacks: dict[LoraLayer, Stack] = {}
        self.layouts: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
        self.last: dict[tuple[tuple[Choice, ...], int], Routing] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of a model makes its own

    def routing(self, choices: tuple[Choice, ...], repeat: int) -> Routing:
        """The routing of such a batch; a server asks for the same one at every step."""
        found = self.last.get((choices, repeat))
        if found is None:
            while len(self.last) >= 8:
                del self.last[next(iter(self.last))]
            found = self.last[choices, repeat] = Routing(self, choices, repeat)
        return found


class Routing:
    """A batch's choices, and what the layers derive from them once and share."""

    def __init__(self, routes: Routes, choices: tuple[Choice, ...], repeat: int):
        self.routes, self.choices, self.repeat = routes, choices, repeat
        self.children = list(dict.fromkeys(child for choice in choices for child, _ in choice))
        self.groups = _groups(choices)
        self._shared: dict[tuple, Any] = {}
        self._accepted: dict[LoraLayer, Stack] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of a model is not inside `route`

    def tokens(self, layer: LoraLayer, x: Tensor) -> int:
        """Tokens (positions) of x: [rows, ..., in] that each choice stands for. StateError if x has another number of rows."""
        rows, wanted = x.shape[0] if x.dim() > 1 else 0, len(self.choices)
        # As many rows as choices, whatever `repeat`: an encoder runs before rows are repeated for beams.
        if rows in (wanted * self.repeat, wanted):
            return x.numel() // (x.shape[-1] * wanted) if wanted and x.numel() else 0
        raise self._wrong(layer, rows)

    def _wrong(self, layer: LoraLayer, rows: int) -> StateError:
        wanted = len(self.choices)
        expected = f"{wanted} x repeat={self.repeat}" if self.repeat > 1 else f"{wanted}, one per choice"
        hint = (
            f"each row seems to come {rows // wanted} times, as with beams: lorakit.route(model, choices, repeat={rows // wanted})"
            if wanted and rows > wanted and rows % wanted == 0
            else "the first axis of what an adapted module is given must be the batch's rows"
        )
        name = self.routes.names.get(layer, type(layer).__name__)
        return StateError(f"'{name}' was given {rows} rows inside lorakit.route; expected {expected}\n  {hint}")

    def share(self, layer: LoraLayer, child: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of x that use an adapter, and their weights."""
        if x.shape[0] not in (len(self.choices) * self.repeat, len(self.choices)):
            raise self._wrong(layer, x.shape[0])
        times = x.shape[0] // max(len(self.choices), 1)
        key = ("share", child, times, x.device)
        if key not in self._shared:
            weights = [dict(choice).get(child, 0.0) for choice in self.choices for _ in range(times)]
            rows = [n for n, weight in enumerate(weights) if weight]
            self._shared[key] = torch.tensor(rows, device=x.device), torch.tensor([weights[n] for n in rows], device=x.device)
        return self._shared[key]

    def stack(self, layer: LoraLayer, y: Tensor) -> Stack | None:
        """The layer's stack with all that this batch names, or None if it names none that is on this layer."""
        stack = self._accepted.get(layer)
        if stack is not None and stack is self.routes.stacks.get(layer) and stack.fits(y) and stack.valid():
            return stack
        wanted = [c for c in self.children if c in layer._modules]  # type: ignore[attr-defined]
        if not wanted:
            return None
        stack = self.routes.stacks.get(layer)
        if stack is None or not stack.fits(y) or not set(wanted) <= set(stack.children) or not stack.valid() or self._excess(stack):
            stack = self.routes.stacks[layer] = Stack(layer, wanted, y)
            stack.layout = self.routes.layouts.setdefault(stack.layout.adapters, stack.layout)
        self._accepted[layer] = stack
        return stack

    def _excess(self, stack: Stack) -> bool:
        used = sum(rank for child, rank in zip(stack.children, stack.ranks, strict=True) if child in self.children)
        return sum(stack.ranks) > STACK_EXCESS * used

    def cut(self, stack: Stack, tokens: int, y: Tensor) -> Cut:
        size = stack.A.shape[1] + stack.Bt.shape[1]
        key = (stack.layout, tokens, size, y.dtype, y.device)
        if key not in self._shared:
            place = {child: (k, 1.0) for k, child in enumerate(stack.children)}
            self._shared[key] = cut(self._rows(place), stack.ranks, tokens, size, y)
        return self._shared[key]

    def segments(self, place: Mapping[str, tuple[int, float]], tokens: int, x: Tensor) -> Segments:
        key = (tuple(place.items()), tokens, x.dtype, x.device)
        if key not in self._shared:
            self._shared[key] = segments(self._rows(place), tokens, x)
        return self._shared[key]

    def _rows(self, place: Mapping[str, tuple[int, float]]) -> list[Row]:
        """`place`: of each adapter on the layer its number and scale."""
        return [tuple(sorted((place[c][0], place[c][1] * w) for c, w in choice if c in place)) for choice in self.choices]


def _groups(choices: tuple[Choice, ...]) -> Choice:
    """The adapters with their weights, if each has as many rows as the others, all side by side, and one adapter only; else ()."""
    runs = [(choice, len(list(same))) for choice, same in itertools.groupby(choices)]
    alone = all(len(choice) == 1 for choice, _ in runs)
    if not alone or len({rows for _, rows in runs}) > 1 or len({choice[0][0] for choice, _ in runs}) < len(runs):
        return ()
    return tuple(choice[0] for choice, _ in runs)


def group(layer: LoraLayer, x: Tensor) -> Group | None:
    """The batch's adapters on this layer as one, for training; None if they differ in more than rank and scale."""
    routing = layer.lora_route
    assert routing is not None
    children, weights = [layer._modules.get(c) for c, _ in routing.groups], [w for _, w in routing.groups]  # type: ignore[attr-defined]
    used: list[LoraFactors] = [f for f in children if f is not None]
    if not routing.groups or not routing.tokens(layer, x):
        return None
    if not layer.training and not x.requires_grad and not any(f.A.requires_grad or f.B.requires_grad for f in used):  # type: ignore[attr-defined]
        return None  # no gradient: `_stacked` is faster
    if not used:
        return Group(None, None, 1.0, 0.0)
    first = used[0]
    dropouts = {f.dropout if layer.training else 0.0 for f in used}  # type: ignore[attr-defined]
    ranks = [f.B.shape[-1] for f in used]
    if (
        len(dropouts) > 1
        or any(f.B.dim() == 3 or f.A.dtype != first.A.dtype for f in used)
        or max(ranks) * len(children) > STACK_EXCESS * sum(ranks)
    ):
        return None
    scales = [0.0 if f is None else f.scale * w for f, w in zip(children, weights, strict=True)]
    A = torch.stack([_filled(None if f is None else f.A, first.A, 0, max(ranks)) for f in children])
    B = torch.stack([_filled(None if f is None else f.B, first.B, 1, max(ranks)) for f in children])
    if len(set(scales)) > 1:
        scales, B = [1.0], B * torch.tensor(scales, dtype=B.dtype, device=B.device).view(-1, 1, 1)
    return Group(A, B, scales[0], dropouts.pop())


def _filled(factor: Tensor | None, like: Tensor, axis: int, rank: int) -> Tensor:
    """A factor with zeros up to this rank on `axis`; for one that is missing zeros, like another."""
    if factor is None:
        return like.new_zeros([rank if i == axis else size for i, size in enumerate(like.shape)])
    missing = rank - factor.shape[axis]
    return F.pad(factor, (0, missing) if axis else (0, 0, 0, missing)) if missing else factor


def add_updates(layer: LoraLayer, y: Tensor, x: Tensor, update: Callable[[Tensor, LoraFactors], Tensor]) -> Tensor:
    """y plus each row's updates, one adapter after the other: for every kind of layer, with whatever autograd makes of it.

    `update(rows of x, factors)` is ΔW's effect without its scale.
    """
    routing = layer.lora_route
    assert routing is not None
    for child in routing.children:
        factors: LoraFactors | None = layer._modules.get(child)  # type: ignore[attr-defined]
        if factors is not None:
            rows, weights = routing.share(layer, child, x)
            change = update(x.index_select(0, rows), factors)
            scales = (factors.scale * weights).to(change.dtype).view(-1, *(1 for _ in change.shape[1:]))
            y = y.index_add(0, rows, (change * scales).to(y.dtype))
    return y


def linear(layer: LoraLayer, base: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    """A linear layer's output. `base`: its own forward."""
    routing = layer.lora_route
    assert routing is not None
    tokens = routing.tokens(layer, x)
    if not tokens:
        return base(x, *args, **kwargs)
    plain = needs_plain()
    if not (plain or layer.training or torch.is_grad_enabled()):  # type: ignore[attr-defined]
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    used = {c: f for c in routing.children if (f := layer._modules.get(c)) is not None}  # type: ignore[attr-defined]
    if not used:
        return base(x, *args, **kwargs)
    together = None if plain else group(layer, x)
    if together is not None and together.A is not None and together.B is not None:
        mask = mask_for(x, together.dropout, layer) if together.dropout else None
        return add_low_rank(_own(layer, base(x, *args, **kwargs)), x, together.A, together.B, together.scale, mask)
    if plain or (layer.training and any(f.dropout for f in used.values())):  # type: ignore[attr-defined]
        return _one_by_one(layer, base(x, *args, **kwargs), x)
    if not (torch.is_grad_enabled() and (x.requires_grad or any(f.A.requires_grad or f.B.requires_grad for f in used.values()))):
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    if any(f.B.dim() == 3 for f in used.values()):  # packed
        return _one_by_one(layer, base(x, *args, **kwargs), x)
    how = routing.segments({c: (k, f.scale) for k, (c, f) in enumerate(used.items())}, tokens, x)
    factors = [(f.A, f.B) for f in used.values()]
    if not args and not kwargs and layer.lora_plain and is_frozen_linear(layer, x):  # type: ignore[attr-defined, arg-type]
        return add_segments(None, x, layer.weight, layer.bias, how, factors)  # type: ignore[attr-defined]
    return add_segments(_own(layer, base(x, *args, **kwargs)), x, None, None, how, factors)


def _one_by_one(layer: LoraLayer, y: Tensor, x: Tensor) -> Tensor:
    def update(rows: Tensor, factors: LoraFactors) -> Tensor:
        return layer.lora_add(y.new_zeros(*rows.shape[:-1], y.shape[-1]), rows, factors, 1.0)  # type: ignore[attr-defined]

    return add_updates(layer, y, x, update)


def _stacked(layer: LoraLayer, routing: Routing, tokens: int, y: Tensor, x: Tensor) -> Tensor:
    stack = routing.stack(layer, y)
    if stack is None:
        return y
    y = _own(layer, y)
    with torch.no_grad():
        x2 = x.reshape(-1, x.shape[-1]).to(y.dtype)
        how = routing.cut(stack, tokens, y)
        mixed.add_stacked(y.view(-1, y.shape[-1]), x2, stack.pieces(how), how)
    return y


def _own(layer: LoraLayer, y: Tensor) -> Tensor:
    """y as a contiguous tensor that may be written into."""
    fresh = layer.lora_fresh_output and not (y.requires_grad and y.is_leaf)  # type: ignore[attr-defined]
    return y.contiguous() if fresh else y.clone(memory_format=torch.contiguous_format)
