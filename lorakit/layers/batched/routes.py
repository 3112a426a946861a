"""What an adapted module computes while each row of the batch, or each token, has an adapter of its own
(`lorakit.route`).

    y[n] = base(x)[n] + Σ_k w[n, k] · update_k(x[n])        w: [rows, adapters], a row of zeros for the base alone

`Routing` holds one batch's choices, and what the layers derive from them once and share. `Routes` holds what outlives a
batch: the layers, their stacks (see `stacks`), and the last batches' routings. Where choices are for tokens, each token
is a row here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...errors import StateError
from ...ops.batched import sampled, stacked
from ...ops.batched.sampled import Pattern, add_sampled
from ...ops.batched.schedule import Row, Schedule, in_place, runs, schedule_rows
from ...ops.batched.segments import Segments, add_segments, segments
from ...ops.linear import add_low_rank, needs_plain
from ...ops.shared_mask import mask_for
from ..frozen import frozen_linear
from .groups import group
from .stacks import Order, Stack, Stacks, Uses

if TYPE_CHECKING:
    from ..layer import LoraLayer
    from ..updates.update import LiveUpdate, Pair

Choice = tuple[tuple[str, float], ...]  # (a child's name, its weight), ...; () is the base


class Chosen(NamedTuple):
    """Choices, one for each row or token. `repeat`: each stands for so many rows."""

    choices: tuple[Choice, ...]
    repeat: int = 1
    per_token: bool = False


class Routes:
    """What a model keeps between batches."""

    def __init__(self, names: dict[LoraLayer, str]):
        self.names = names
        self.stacks = Stacks()
        self.last: dict[Chosen, Routing] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of a model makes its own

    def routing(self, chosen: Chosen) -> Routing:
        """The routing of such a batch; a server asks for the same one at every step."""
        found = self.last.get(chosen)
        if found is None:
            while len(self.last) >= 8:
                del self.last[next(iter(self.last))]
            found = self.last[chosen] = Routing(self, chosen)
        self.stacks.begin(found.children)
        return found

    def attached(self, child: str, names: Mapping[LoraLayer, str]) -> None:
        """An adapter was attached to these layers."""
        for layer, name in names.items():
            self.names.setdefault(layer, name)
            self.stacks.joined(layer, layer._modules[child].width)

    def detached(self, child: str, ranks: Mapping[LoraLayer, int], left: set[LoraLayer]) -> None:
        """An adapter was detached from these layers; on those of `left` others are. Keeps nothing of it."""
        self.last = {chosen: routing for chosen, routing in self.last.items() if child not in routing.children}
        for layer, rank in ranks.items():
            self.stacks.forget(layer, child, rank, last=layer not in left)
            if layer not in left:
                del self.names[layer]
                for routing in self.last.values():
                    routing.forget(layer)


class Routing:
    """A batch's choices, and what the layers derive from them once and share."""

    def __init__(self, routes: Routes, chosen: Chosen):
        self.routes = routes
        self.choices, self.repeat, self.per_token = chosen
        self.children = list(dict.fromkeys(child for choice in self.choices for child, _ in choice))
        self.groups = _groups(self.choices)
        self._shared: dict[tuple, Any] = {}
        self._uses: dict[LoraLayer, Uses] = {}
        self._unpaired: dict[LoraLayer, list[str]] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of a model is not inside `route`

    def forget(self, layer: LoraLayer) -> None:
        self._uses.pop(layer, None)
        self._unpaired.pop(layer, None)

    def unpaired(self, layer: LoraLayer) -> list[str]:
        """The adapters whose update of this layer is no pair of matrices."""
        found = self._unpaired.get(layer)
        if found is None:
            modules = layer._modules
            found = self._unpaired[layer] = [c for c in self.children if c in modules and modules[c].pair() is None]
        return found

    def tokens(self, layer: LoraLayer, x: Tensor) -> int:
        """Tokens (positions) of x: [rows, ..., in] that each choice stands for. StateError if x has another number of
        rows.
        """
        wanted = len(self.choices)
        if self.per_token:
            self._check_tokens(layer, x.shape[:-1])
            return 1 if wanted else 0
        rows = x.shape[0] if x.dim() > 1 else 0
        # As many rows as choices, whatever `repeat`: an encoder runs before rows are repeated for beams.
        if rows in (wanted * self.repeat, wanted):
            return x.numel() // (x.shape[-1] * wanted) if wanted and x.numel() else 0
        raise self._wrong(layer, rows)

    def _check_tokens(self, layer: LoraLayer, shape: Sequence[int]) -> None:
        """StateError unless `shape`, of what a layer is given without its features, is one axis of as many tokens as
        there are choices.
        """
        wanted = len(self.choices)
        long = [size for size in shape if size != 1] or [1]
        if shape and long == [wanted]:
            return
        name, count = self._name(layer), torch.Size(shape).numel()
        if shape and count == wanted and len(long) > 1:
            raise StateError(
                f"'{name}' was given {' x '.join(map(str, shape))} tokens inside lorakit.route(per='token'); expected "
                f"one row of {wanted}\n"
                "  put the rows behind each other as [1, tokens], or choose per row: lorakit.route(model, choices) "
                "without `per`"
            )
        hint = (
            f"each of the {count} tokens needs its choice, also the prompt's and padding"
            if count > wanted
            else (
                "every adapted module must be given all tokens; leave those that see some of them (pooled, routed to "
                "experts) without adapter"
            )
        )
        raise StateError(
            f"'{name}' was given {count} tokens inside lorakit.route(per='token'); expected {wanted}, one per choice\n"
            f"  {hint}"
        )

    def _wrong(self, layer: LoraLayer, rows: int) -> StateError:
        wanted = len(self.choices)
        expected = f"{wanted} x repeat={self.repeat}" if self.repeat > 1 else f"{wanted}, one per choice"
        hint = (
            f"each row seems to come {rows // wanted} times, as with beams: lorakit.route(model, choices, "
            f"repeat={rows // wanted})"
            if wanted and rows > wanted and rows % wanted == 0
            else "the first axis of what an adapted module is given must be the batch's rows"
        )
        return StateError(
            f"'{self._name(layer)}' was given {rows} rows inside lorakit.route; expected {expected}\n  {hint}"
        )

    def _name(self, layer: LoraLayer) -> str:
        return self.routes.names.get(layer, type(layer).__name__)

    def as_rows(self, layer: LoraLayer, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer is given and what its base makes of it, with an axis of rows first: as they are, or one row for
        each token.
        """
        if not self.per_token:
            return y, x
        if layer.lora_kind == "conv":
            raise StateError(
                f"'{self._name(layer)}' is a convolution, which mixes neighbouring tokens, so they cannot have "
                "adapters of their own\n"
                "  give each adapter's tokens a row of their own: lorakit.route(model, choices) without `per`"
            )
        axes = y.dim() - 1  # all but the features; an embedding's ids have none
        self._check_tokens(layer, x.shape[:axes])
        return y.reshape(-1, y.shape[-1]), x.reshape(-1, *x.shape[axes:])

    def share(self, layer: LoraLayer, child: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of x that use an adapter, and their weights."""
        if x.shape[0] not in (len(self.choices) * self.repeat, len(self.choices)):
            raise self._wrong(layer, x.shape[0])
        times = x.shape[0] // max(len(self.choices), 1)
        key = ("share", child, times, x.device)
        if key not in self._shared:
            weights = [dict(choice).get(child, 0.0) for choice in self.choices for _ in range(times)]
            rows = [n for n, weight in enumerate(weights) if weight]
            self._shared[key] = (
                torch.tensor(rows, device=x.device),
                torch.tensor([weights[n] for n in rows], device=x.device),
            )
        return self._shared[key]

    def add_updates(
        self, layer: LoraLayer, y: Tensor, x: Tensor, children: Sequence[str] | None = None, y0: Tensor | None = None
    ) -> Tensor:
        """y plus each row's updates, one adapter after the other: for every kind of layer and update, with whatever
        autograd makes of it.

        `children`: of these adapters alone. `y0`: the base's output, if y holds more already.
        """
        whole = y
        y0 = self.as_rows(layer, y if y0 is None else y0, x)[0]
        y, x = self.as_rows(layer, y, x)
        for child in self.children if children is None else children:
            update: LiveUpdate | None = layer._modules.get(child)
            if update is None:
                continue
            rows, weights = self.share(layer, child, x)
            pair = update.pair()
            if pair is not None:
                change, weights = layer.lora_branch(x.index_select(0, rows), pair, y), pair.scale * weights
            else:
                change = update.change(layer, x.index_select(0, rows), y0.index_select(0, rows))
            weights = weights.to(change.dtype).view(-1, *(1 for _ in change.shape[1:]))
            y = y.index_add(0, rows, (change * weights).to(y.dtype))
        return y.view_as(whole)

    def stack(self, layer: LoraLayer, y: Tensor) -> Stack | None:
        """The layer's stack with all that this batch names, or None if it names none that is on this layer."""
        uses, stacks = self._uses.get(layer), self.routes.stacks
        if uses is not None and uses.stack is stacks.of.get(layer) and uses.stack.fits(y) and uses.valid():
            return uses.stack
        modules = layer._modules
        children = [c for c in self.children if c in modules and modules[c].width]
        if not children:
            return None
        uses = self._uses[layer] = stacks.uses(layer, children, y, self.routes.names)
        return uses.stack

    def add(self, stack: Stack, tokens: int, y: Tensor, x: Tensor) -> None:
        """Write the updates into y: [N, out], contiguous, for x: [N, in]; `tokens` of each row."""
        size = x.shape[1] + y.shape[1]
        key = (stack.layout, tokens, size, y.dtype, y.device)
        if key not in self._shared:
            self._shared[key] = self._how(stack, tokens, size, y)
        how, order = self._shared[key]
        if isinstance(how, Pattern):
            add_sampled(y, x, stack.A, stack.Bt, how)
        else:
            stacked.add_stacked(y, x, stack.pieces(how, order), how)

    def _how(self, stack: Stack, tokens: int, size: int, y: Tensor) -> tuple[Pattern | Schedule, Order | None]:
        """How the updates are computed, and of which adapters side by side; None for those of the stack wherever they
        lie.
        """
        layout = stack.layout
        children = [c for c in self.children if c in layout.places]
        rows, spans = self._rows({c: (k, 1.0) for k, c in enumerate(children)}), [layout.places[c] for c in children]
        if in_place(rows, tokens):
            return runs(rows, spans, tokens), None
        if sampled.pays(rows, tokens, y):
            key = ("pattern", layout, tokens, y.dtype)
            if key not in self._shared:
                self._shared[key] = sampled.pattern(rows, spans, tokens, layout.capacity, y)
            return self._shared[key], None
        ordered = ("order", layout, y.device)
        if ordered not in self._shared:
            self._shared[ordered] = Order(layout, children, y.device)
        order: Order = self._shared[ordered]
        rows = self._rows({c: (k, 1.0) for k, c in enumerate(order.children)})
        return schedule_rows(rows, order.ranks, tokens, size, y), order

    def segments(self, place: Mapping[str, tuple[int, float]], tokens: int, x: Tensor) -> Segments:
        key = (tuple(place.items()), tokens, x.dtype, x.device)
        if key not in self._shared:
            self._shared[key] = segments(self._rows(place), tokens, x)
        return self._shared[key]

    def _rows(self, place: Mapping[str, tuple[int, float]]) -> list[Row]:
        """`place`: of each adapter on the layer its number and scale."""
        read: dict[Choice, Row] = {}
        for choice in self.choices:
            if choice not in read:
                read[choice] = tuple(sorted((place[c][0], place[c][1] * w) for c, w in choice if c in place))
        return [read[choice] for choice in self.choices]


def _groups(choices: tuple[Choice, ...]) -> Choice:
    """The adapters with their weights, if each has as many rows as the others, all side by side, and one adapter only;
    else ().
    """
    runs = [(choice, len(list(same))) for choice, same in itertools.groupby(choices)]
    alone = all(len(choice) == 1 for choice, _ in runs)
    if not alone or len({rows for _, rows in runs}) > 1 or len({choice[0][0] for choice, _ in runs}) < len(runs):
        return ()
    return tuple(choice[0] for choice, _ in runs)


def linear(layer: LoraLayer, base: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    """A linear layer's output. `base`: its own forward."""
    routing = layer.lora_route
    assert routing is not None
    tokens = routing.tokens(layer, x)
    if not tokens:
        return base(x, *args, **kwargs)
    unpaired = routing.unpaired(layer)
    if not unpaired:
        return _pairs(layer, routing, tokens, base, x, *args, **kwargs)
    y0 = base(x, *args, **kwargs)
    y = _pairs(layer, routing, tokens, lambda *_, **__: y0.clone(), x, *args, **kwargs)  # it may be written into
    return routing.add_updates(layer, y, x, unpaired, y0)


def _pairs(
    layer: LoraLayer, routing: Routing, tokens: int, base: Callable[..., Tensor], x: Tensor, *args, **kwargs
) -> Tensor:
    """The output with those updates that are pairs of matrices."""
    plain = needs_plain()
    if not (plain or layer.training or torch.is_grad_enabled()):
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    modules = layer._modules
    used: dict[str, Pair] = {
        c: pair for c in routing.children if c in modules and (pair := modules[c].pair()) is not None
    }
    if not used:
        return base(x, *args, **kwargs)
    together = None if plain else group(layer, x)
    if together is not None and together.A is not None and together.B is not None:
        mask = mask_for(x, together.dropout, layer) if together.dropout else None
        return add_low_rank(_own(layer, base(x, *args, **kwargs)), x, together.A, together.B, together.scale, mask)
    if plain or (layer.training and any(f.dropout for f in used.values())):
        return routing.add_updates(layer, base(x, *args, **kwargs), x, list(used))
    if not (
        torch.is_grad_enabled()
        and (x.requires_grad or any(f.A.requires_grad or f.B.requires_grad for f in used.values()))
    ):
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    if any(f.B.dim() == 3 for f in used.values()):  # packed
        return routing.add_updates(layer, base(x, *args, **kwargs), x, list(used))
    how = routing.segments({c: (k, f.scale) for k, (c, f) in enumerate(used.items())}, tokens, x)
    factors = [(f.A, f.B) for f in used.values()]
    own = frozen_linear(layer, x) if not args and not kwargs and layer.lora_plain else None
    if own is not None:
        return add_segments(None, x, *own, how, factors)
    return add_segments(_own(layer, base(x, *args, **kwargs)), x, None, None, how, factors)


def _stacked(layer: LoraLayer, routing: Routing, tokens: int, y: Tensor, x: Tensor) -> Tensor:
    stack = routing.stack(layer, y)
    if stack is None:
        return y
    y = _own(layer, y)
    with torch.no_grad():
        routing.add(stack, tokens, y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype))
    return y


def _own(layer: LoraLayer, y: Tensor) -> Tensor:
    """y as a contiguous tensor that may be written into."""
    fresh = layer.lora_fresh_output and not (y.requires_grad and y.is_leaf)
    return y.contiguous() if fresh else y.clone(memory_format=torch.contiguous_format)
