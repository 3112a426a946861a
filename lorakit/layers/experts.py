"""Adapted experts: a low-rank update of each expert's matrices, computed on the tokens that are routed to it.

    y[t] = Σ_k w[t, k] · (W_down + s B A) gate((W_up + s B A) x[t])        of the experts e(t, k) that the router chose

    A: [E, r, in]   B: [E, out, r]

`ExpertsLayer` is in front of the experts' own class. Without an active adapter its forward is the base's own, whichever
implementation the model's config names; otherwise it computes what transformers' experts interface says, by what its
attributes say: projection up, gate, projection down, the router's weights. `ExpertWeightLayer` is one parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EXPERTS
from ..errors import StateError, TargetError
from ..ops.experts import Routed, low_rank, product
from .bases import base_of
from .expert_weight import ExpertWeight, child_of, parameters_of
from .layer import LoraLayer, Shapes, Swapped, adapted_class, init_a, mixin_and_base, rebind_hooked_forward


class ExpertWeightLayer(LoraLayer):
    """The mixin for one parameter of an experts module; it is no module that a model calls."""

    lora_kind = "experts"
    experts: Any  # the module
    parameter: str
    is_transposed: bool

    @property
    def lora_transposed(self) -> bool:  # type: ignore[override]
        """Whether the weight is [E, in, out]."""
        return self.is_transposed

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        experts, *sizes = base_of(self).shape(self)
        size_out, size_in = reversed(sizes) if self.is_transposed else sizes
        return (experts, rank, size_in), (experts, size_out, rank)

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        expected = self.lora_shapes(A.shape[1] if A.dim() == 3 else 1)
        if (tuple(A.shape), tuple(B.shape)) == expected:
            return None
        return (
            f"A {list(A.shape)} and B {list(B.shape)} do not fit; expected A {list(expected[0])} and B "
            f"{list(expected[1])}"
        )

    def lora_fresh(
        self, shapes: Shapes, rank: int, init: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Initialize each expert's A as a linear's; B is zero."""
        A, B = torch.empty(shapes[0], dtype=dtype, device=device), torch.zeros(shapes[1], dtype=dtype, device=device)
        for own in A:
            init_a(own, init, rank)
        return A, B

    def lora_live(self, variant: str) -> str:
        return EXPERTS if variant == "lora" else variant

    def lora_adopted(self) -> None:
        """Become a child of the experts, and give them their adapted class."""
        experts = self.experts
        experts._modules[child_of(self.parameter)] = self
        if not isinstance(experts, ExpertsLayer):
            experts.__class__ = adapted_class(ExpertsLayer, type(experts))
            rebind_hooked_forward(experts)
            experts.lora_check()

    def lora_released(self) -> None:
        experts = self.experts
        experts._modules.pop(child_of(self.parameter), None)
        if not any(isinstance(child, ExpertWeight) for child in experts._modules.values()):
            experts.__class__ = mixin_and_base(type(experts))[1]
            rebind_hooked_forward(experts)

    def lora_of_pairs(self, y: Tensor, x: Tensor, routed: Routed, tokens: int) -> Tensor:
        """Return y [S, out] plus the updates in use. x: [S, in], of the pairs `routed`; `tokens`: before routing."""
        if self.lora_route is None:
            for update, weight in self.lora_in_use():
                y = y + self._branch(update.pair(self), x, weight, routed)
            return y
        routing = self.lora_route
        for child in routing.children:
            own = self._modules.get(child)
            if own is None:
                continue
            weights = routing.weights_of_tokens(child, self, tokens, x)[routed.token]  # [S]
            chosen = weights.nonzero().flatten()
            change = self._branch(own.pair(self), x[chosen], 1.0, routed.of_pairs(chosen))  # [n, out]
            y = y.index_add(0, chosen, change * weights[chosen].to(y.dtype).unsqueeze(-1))
        return y

    def _branch(self, pair: Any, x: Tensor, weight: float, routed: Routed) -> Tensor:
        if self.training and pair.dropout:
            x = F.dropout(x, pair.dropout)
        return low_rank(x, pair.A, pair.B, pair.scale * weight, routed)


class ExpertsLayer(Swapped):
    """The mixin for experts modules."""

    is_transposed: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool = False
    _apply_gate: Any
    act_fn: Any
    post_expert_norm: Any

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        children = [c for c in self._modules.values() if isinstance(c, ExpertWeightLayer)]
        if not any(c.lora_route is not None or c.lora_in_use() for c in children):
            out: Tensor = super().forward(hidden_states, *args, **kwargs)
            return out
        return self.lora_computed(hidden_states, *_routing(args, kwargs))

    @torch.no_grad()
    def lora_check(self) -> None:
        """Raise TargetError if the module's own forward computes something else than the interface says; tried once for
        each class and implementation, on three tokens.
        """
        key = type(self), getattr(getattr(self, "config", None), "_experts_implementation", None)
        up, down = (getattr(self, name) for name in parameters_of(self))
        if key in _checked or up.is_meta or down.is_meta:
            return
        size = up.shape[1 if self.is_transposed else 2]
        x = torch.linspace(-1, 1, 3 * size, dtype=up.dtype, device=up.device).view(3, size)
        index = torch.arange(3, device=up.device).view(3, 1) % up.shape[0]
        weights = torch.full((3, 1), 0.5, dtype=up.dtype, device=up.device)
        own, ours = super().forward(x, index, weights), self.lora_computed(x, index, weights)
        largest = own.abs().max()
        if not bool(largest.isfinite()):
            return  # weights without values say nothing
        if own.shape != ours.shape or float((own - ours).abs().max()) > 0.05 * float(largest):
            raise TargetError(
                f"a {mixin_and_base(type(self))[1].__name__} computes something else than transformers' experts "
                "interface says, so its experts cannot be adapted\n"
                "  exclude them: LoraConfig(exclude=['experts'])"
            )
        _checked.add(key)

    def lora_computed(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute what the experts interface says, with the updates in use: [tokens, h]. hidden_states: [tokens, h];
        `index`, `weights`: [tokens, k], each token's experts and their weights.
        """
        up, down = parameters_of(self)
        stack: Tensor = getattr(self, up)
        routed, tokens = Routed.of(index, stack.shape[0]), hidden_states.shape[0]
        x = hidden_states.to(stack.dtype)[routed.token]  # [S, h]
        inner = self._projected(up, x, routed, tokens)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # [S, i]
        y = self._projected(down, inner, routed, tokens)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return routed.summed(y, weights).to(hidden_states.dtype)

    def _projected(self, parameter: str, x: Tensor, routed: Routed, tokens: int) -> Tensor:
        W: Tensor = getattr(self, parameter)
        y = product(x, W, routed, self.is_transposed)
        if self.has_bias:
            y = y + getattr(self, f"{parameter}_bias")[routed.expert]
        layer = self._modules.get(child_of(parameter))
        return layer.lora_of_pairs(y, x, routed, tokens) if isinstance(layer, ExpertWeightLayer) else y


_checked: set[tuple[type, str | None]] = set()


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the router's (experts, weights), which the models name differently: whole numbers and fractions."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    index = [t for t in given if not t.is_floating_point()]
    weights = [t for t in given if t.is_floating_point()]
    if len(index) != 1 or len(weights) != 1 or index[0].shape != weights[0].shape:
        raise StateError(
            f"an experts module was called with {len(given)} tensors besides its hidden states; expected each token's "
            "experts and their weights, both [tokens, k]\n"
            "  exclude the experts: LoraConfig(exclude=['experts'])"
        )
    return index[0], weights[0]
