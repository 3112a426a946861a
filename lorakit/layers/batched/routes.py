"""The forward of adapted modules inside `lorakit.route`, where each row of the batch, or each token, has its adapter.

    y[n] = base(x)[n] + Σ_k w[n, k] · update_k(x[n])        w: [rows, adapters], a row of zeros for the base alone

`Routing` has one batch's choices, and what layers derive from them once and share. `Routes` has what outlives a batch:
the layers, their stacks (see `stacks`), and the last batches' routings. With choices per token, each token is a row
here. Linears have faster ways than `Routing.add_updates`, see `linears`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...errors import StateError
from ...ops.batched import sampled, stacked
from ...ops.batched.sampled import Pattern, add_sampled
from ...ops.batched.schedule import Row, Schedule, gathered_already, in_place, runs, schedule_rows
from ...ops.batched.segments import Segments, segments
from .stacks import Order, Stack, Stacks, Uses

if TYPE_CHECKING:
    from ..layer import LoraLayer
    from ..updates.update import LiveUpdate

Choice = tuple[tuple[str, float], ...]  # (a child's name, its weight), ...; () is the base


class Chosen(NamedTuple):
    """A batch's choices, one per row or token. `repeat`: consecutive rows per choice."""

    choices: tuple[Choice, ...]
    repeat: int = 1
    per_token: bool = False


class OfChildren(NamedTuple):
    """What depends on which adapters a batch uses, and not on its rows: a server's rows change at most steps."""

    children: frozenset[str]
    uses: dict[LoraLayer, Uses]
    unpaired: dict[LoraLayer, list[str]]

    def forget(self, layer: LoraLayer) -> None:
        """Drop what is cached for a layer."""
        self.uses.pop(layer, None)
        self.unpaired.pop(layer, None)


class Routes:
    """What `route` caches on a model between batches. `names`: layer -> full name; others: see `Stacks`."""

    def __init__(self, names: dict[LoraLayer, str], expected: int = 0, fixed: bool = False):
        self.names = names
        self.stacks = Stacks(expected, fixed)
        self.last: dict[Chosen, Routing] = {}
        self._of: dict[frozenset[str], OfChildren] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of the model builds its own

    def routing(self, chosen: Chosen) -> Routing:
        """Return the routing for these choices. The last ones are cached, as a server repeats one at every step."""
        routing = self.last.get(chosen)
        if routing is None:
            while len(self.last) >= 8:
                del self.last[next(iter(self.last))]
            routing = self.last[chosen] = Routing(self, chosen)
        self.stacks.begin(routing.children)
        return routing

    def of_children(self, children: frozenset[str]) -> OfChildren:
        """Return what is cached for batches that use these adapters."""
        found = self._of.pop(children, None) or OfChildren(children, {}, {})
        while len(self._of) >= 8:
            del self._of[next(iter(self._of))]
        self._of[children] = found
        return found

    def attached(self, child: str, names: Mapping[LoraLayer, str]) -> None:
        """Note that an adapter was attached to these layers. `names`: layer -> full name."""
        for layer, name in names.items():
            self.names.setdefault(layer, name)
            self.stacks.joined(layer, layer._modules[child].width)

    def detached(self, child: str, ranks: Mapping[LoraLayer, int], still_adapted: set[LoraLayer]) -> None:
        """Drop all that is cached of an adapter that was detached from these layers, of these ranks.

        `still_adapted`: the layers that have other adapters.
        """
        self.last = {chosen: routing for chosen, routing in self.last.items() if child not in routing.children}
        self._of = {children: of for children, of in self._of.items() if child not in children}
        for layer, rank in ranks.items():
            self.stacks.forget(layer, child, rank, last=layer not in still_adapted)
            if layer not in still_adapted:
                del self.names[layer]
                for of in (*self._of.values(), *(routing.of_children for routing in self.last.values())):
                    of.forget(layer)


class Routing:
    """One batch's choices, and what layers derive from them once and share."""

    def __init__(self, routes: Routes, chosen: Chosen):
        self.routes = routes
        self.choices, self.repeat, self.per_token = chosen
        self.children = list(dict.fromkeys(child for choice in self.choices for child, _ in choice))
        self.groups = _groups(self.choices)
        self.of_children = routes.of_children(frozenset(self.children))
        self._shared: dict[tuple, Any] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of the model is not inside `route`

    def unpaired(self, layer: LoraLayer) -> list[str]:
        """Return the adapters whose update of this layer is not a pair of matrices."""
        children = self.of_children.unpaired.get(layer)
        if children is None:
            modules = layer._modules
            children = self.of_children.unpaired[layer] = (
                []
                if self.routes.stacks.has(layer, self.of_children.children)
                else [c for c in self.children if c in modules and not modules[c].width]
            )
        return children

    def tokens(self, layer: LoraLayer, x: Tensor) -> int:
        """Return the number of tokens (positions) of x [rows, ..., in] per choice.

        Raises StateError if x has another number of rows or tokens than there are choices.
        """
        count = len(self.choices)
        if self.per_token:
            self._check_tokens(layer, x.shape[:-1])
            return 1 if count else 0
        rows = x.shape[0] if x.dim() > 1 else 0
        # Rows without `repeat` are accepted too: an encoder runs before rows are repeated for beams.
        if rows in (count * self.repeat, count):
            return x.numel() // (x.shape[-1] * count) if count and x.numel() else 0
        raise self._wrong_rows(layer, rows)

    def _check_tokens(self, layer: LoraLayer, shape: Sequence[int]) -> None:
        """Raise StateError unless `shape`, the input's without features, is one axis with a token for each choice."""
        expected = len(self.choices)
        long = [size for size in shape if size != 1] or [1]
        if shape and long == [expected]:
            return
        name, count = self._name(layer), torch.Size(shape).numel()
        if shape and count == expected and len(long) > 1:
            raise StateError(
                f"'{name}' was given {' x '.join(map(str, shape))} tokens inside lorakit.route(per='token'); expected "
                f"one row of {expected}\n"
                "  concatenate the rows to [1, tokens], or choose per row: lorakit.route(model, choices) without `per`"
            )
        hint = (
            f"each of the {count} tokens needs a choice, including the prompt's and padding"
            if count > expected
            else (
                "every adapted module must get all tokens; do not adapt modules that see only some of them (pooled, "
                "routed to experts)"
            )
        )
        raise StateError(
            f"'{name}' was given {count} tokens inside lorakit.route(per='token'); expected {expected}, one per "
            f"choice\n  {hint}"
        )

    def _wrong_rows(self, layer: LoraLayer, rows: int) -> StateError:
        """Build the error for an input with another number of rows than there are choices."""
        count = len(self.choices)
        expected = f"{count} x repeat={self.repeat}" if self.repeat > 1 else f"{count}, one per choice"
        hint = (
            f"each row seems to occur {rows // count} times, as with beams: lorakit.route(model, choices, "
            f"repeat={rows // count})"
            if count and rows > count and rows % count == 0
            else "the first axis of an adapted module's input must be the batch's rows"
        )
        return StateError(
            f"'{self._name(layer)}' was given {rows} rows inside lorakit.route; expected {expected}\n  {hint}"
        )

    def _name(self, layer: LoraLayer) -> str:
        return self.routes.names.get(layer, type(layer).__name__)

    def as_rows(self, layer: LoraLayer, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base's output y and the input x with an axis of rows first; with choices per token, of tokens."""
        if not self.per_token:
            return y, x
        if layer.lora_kind == "conv":
            raise StateError(
                f"'{self._name(layer)}' is a convolution, which mixes neighbouring tokens, so its adapters cannot be "
                "chosen per token\n"
                "  put each adapter's tokens into a separate row: lorakit.route(model, choices) without `per`"
            )
        axes = y.dim() - 1  # all but the features; an embedding's ids have none
        self._check_tokens(layer, x.shape[:axes])
        return y.reshape(-1, y.shape[-1]), x.reshape(-1, *x.shape[axes:])

    def rows_using(self, child: str, layer: LoraLayer, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the indices of the rows of x that use an adapter, and their weights, of this dtype: [n] each."""
        if x.shape[0] not in (len(self.choices) * self.repeat, len(self.choices)):
            raise self._wrong_rows(layer, x.shape[0])
        times = x.shape[0] // max(len(self.choices), 1)
        key = ("rows", child, times, dtype, x.device)
        if key not in self._shared:
            weights = [dict(choice).get(child, 0.0) for choice in self.choices for _ in range(times)]
            rows = [n for n, weight in enumerate(weights) if weight]
            self._shared[key] = (
                torch.tensor(rows, device=x.device),
                torch.tensor([weights[n] for n in rows], dtype=dtype, device=x.device),
            )
        return self._shared[key]

    def weights_of_tokens(self, child: str, layer: LoraLayer, tokens: int, x: Tensor) -> Tensor:
        """Return an adapter's weight for each token of a batch whose rows follow each other: [tokens], float32.

        Experts get their tokens so, without an axis of rows. Raises StateError if the choices do not divide them.
        """
        count = len(self.choices)
        if self.per_token:
            self._check_tokens(layer, (tokens,))
        elif not count or tokens % count:
            raise self._wrong_rows(layer, tokens)
        key = ("tokens", child, tokens, x.device)
        if key not in self._shared:
            weights = torch.tensor([dict(choice).get(child, 0.0) for choice in self.choices], device=x.device)
            self._shared[key] = weights.repeat_interleave(tokens // count)
        found: Tensor = self._shared[key]
        return found

    def by_choice(self, layer: LoraLayer, rows: int, device: torch.device) -> list[tuple[Choice, Tensor]]:
        """Return the different choices of a batch, each with the indices of its rows.

        Raises StateError for another number of rows than there are choices, and for choices per token.
        """
        if self.per_token:
            raise StateError(
                f"'{self._name(layer)}' is an attention, whose weights are for all tokens of a row, so its adapters "
                "cannot be chosen per token\n"
                "  put each adapter's tokens into a separate row: lorakit.route(model, choices) without `per`"
            )
        if rows not in (len(self.choices) * self.repeat, len(self.choices)):
            raise self._wrong_rows(layer, rows)
        times = rows // max(len(self.choices), 1)
        key = ("by choice", times, device)
        if key not in self._shared:
            of: dict[Choice, list[int]] = {}
            for n, choice in enumerate(self.choices):
                of.setdefault(choice, []).extend(range(n * times, (n + 1) * times))
            self._shared[key] = [(choice, torch.tensor(index, device=device)) for choice, index in of.items()]
        return self._shared[key]

    def add_updates(
        self,
        layer: LoraLayer,
        y: Tensor,
        x: Tensor,
        children: Sequence[str] | None = None,
        y0: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return y plus each row's updates, one adapter after the other, for any kind of layer and update.

        `children`: only these adapters; `y0`: the base's output, if y already includes updates; `bias`: the one in each
        row of it, [rows, out], if they differ.
        """
        original = y
        y0 = self.as_rows(layer, y if y0 is None else y0, x)[0]
        y, x = self.as_rows(layer, y, x)
        for child in self.children if children is None else children:
            update: LiveUpdate | None = layer._modules.get(child)
            if update is None:
                continue
            rows, weights = self.rows_using(child, layer, x, y.dtype)
            pair = update.pair(layer)
            own_x, own_y0 = x.index_select(0, rows), y0.index_select(0, rows)
            if bias is not None and layer.bias is not None:  # as if all rows had the module's own
                own_y0 = own_y0 - layer.lora_by_output(bias.index_select(0, rows) - layer.bias, own_y0)
            if pair is None:
                change = update.change(layer, own_x, own_y0)
            elif pair.gain is None:
                change, weights = layer.lora_branch(own_x, pair, y), pair.scale * weights
            else:
                change = layer.lora_gained(layer.lora_branch(own_x, pair, y) * pair.scale, own_y0, pair.gain - 1)
            weights = weights.to(change.dtype).view(-1, *(1 for _ in change.shape[1:]))
            y = y.index_add(0, rows, (change * weights).to(y.dtype))
        return y.view_as(original)

    def stack(self, layer: LoraLayer, y: Tensor) -> Stack | None:
        """Return the layer's stack with all adapters of this batch in it; None if none of them is on this layer."""
        uses, stacks = self.of_children.uses.get(layer), self.routes.stacks
        if uses is not None and uses.stack is stacks.of.get(layer) and uses.stack.fits(y) and uses.valid():
            return uses.stack
        modules, children = layer._modules, self.children
        if not stacks.has(layer, self.of_children.children):
            children = [c for c in children if c in modules and modules[c].width]
        if not children:
            return None
        uses = self.of_children.uses[layer] = stacks.uses(layer, children, y, self.routes.names)
        return uses.stack

    def stacked_gains(self, layer: LoraLayer) -> Mapping[str, Tensor]:
        """Return g [out] of each adapter of the batch that has one, as they were when `stack` returned."""
        return self.of_children.uses[layer].gains

    def weights(self, children: Sequence[str], like: Tensor) -> Tensor:
        """Return the weights of these adapters in each choice: [choices, adapters], in the dtype of `like`."""
        key = ("weights", tuple(children), like.dtype, like.device)
        if key not in self._shared:
            of = {choice: [dict(choice).get(child, 0.0) for child in children] for choice in set(self.choices)}
            rows = [of[choice] for choice in self.choices]
            self._shared[key] = torch.tensor(rows, dtype=like.dtype, device=like.device)
        found: Tensor = self._shared[key]
        return found

    def add(self, stack: Stack, tokens: int, y: Tensor, x: Tensor) -> None:
        """Add the updates to y in place. y: [N, out], contiguous, x: [N, in]; `tokens`: of each row."""
        size = x.shape[1] + y.shape[1]
        key = (stack.layout, tokens, size, stack.dtype, stack.device)
        if key not in self._shared:
            self._shared[key] = self._plan(stack, tokens, size, y)
        plan, order = self._shared[key]
        if isinstance(plan, Pattern):
            add_sampled(y, x, stack.A, stack.Bt, plan)
        else:
            stacked.add_stacked(y, x, stack.chunk_factors(plan, order), plan)

    def _plan(self, stack: Stack, tokens: int, size: int, y: Tensor) -> tuple[Pattern | Schedule, Order | None]:
        """Plan how to compute the updates. Returns the order in which adapters must be adjacent, None if it does not
        matter.
        """
        layout = stack.layout
        children = [c for c in self.children if c in layout.spans]
        rows, spans = self._rows({c: (k, 1.0) for k, c in enumerate(children)}), [layout.spans[c] for c in children]
        if in_place(rows, tokens):
            return runs(rows, spans, tokens), None
        if sampled.pays(rows, tokens, y):
            key = ("pattern", layout, tokens, y.dtype)
            if key not in self._shared:
                self._shared[key] = sampled.pattern(rows, spans, tokens, layout.capacity, y)
            return self._shared[key], None
        if gathered_already(rows, y):
            return runs(rows, spans, tokens), None
        ordered = ("order", layout, y.device)
        if ordered not in self._shared:
            self._shared[ordered] = Order(layout, children, y.device)
        order: Order = self._shared[ordered]
        rows = self._rows({c: (k, 1.0) for k, c in enumerate(order.children)})
        return schedule_rows(rows, order.ranks, tokens, size, y), order

    def segments(self, adapters: Mapping[str, tuple[int, float]], tokens: int, x: Tensor) -> Segments:
        """Divide the batch into segments. `adapters`: see `_rows`; `tokens`: of each row."""
        key = (tuple(adapters.items()), tokens, x.dtype, x.device)
        if key not in self._shared:
            self._shared[key] = segments(self._rows(adapters), tokens, x)
        return self._shared[key]

    def _rows(self, adapters: Mapping[str, tuple[int, float]]) -> list[Row]:
        """Return each row's adapters. `adapters`: child -> (index, scale) of those on the layer."""
        resolved: dict[Choice, Row] = {}
        for choice in self.choices:
            if choice not in resolved:
                resolved[choice] = tuple(
                    sorted((adapters[c][0], adapters[c][1] * w) for c, w in choice if c in adapters)
                )
        return [resolved[choice] for choice in self.choices]


def _groups(choices: tuple[Choice, ...]) -> Choice:
    """Return the adapters with their weights if each has equally many, adjacent rows of its own; else ()."""
    runs = [(choice, len(list(same))) for choice, same in itertools.groupby(choices)]
    single = all(len(choice) == 1 for choice, _ in runs)
    if not single or len({rows for _, rows in runs}) > 1 or len({choice[0][0] for choice, _ in runs}) < len(runs):
        return ()
    return tuple(choice[0] for choice, _ in runs)
