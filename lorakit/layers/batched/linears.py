"""The forward of a linear inside `lorakit.route`: in few products where its updates are pairs of matrices.

Adapters that train with equally many rows each are one batched product (`groups`), others segments of the batch, and
without gradients the layer's stack serves (`stacks`). The gains of pairs (DoRA) are a factor for each row and output:

    y[n] = base(x)[n] + h[n] ∘ (base(x)[n] - b) + ...        h = w (g - 1): [rows, out]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops.batched.segments import add_segments
from ...ops.linear import add_low_rank, needs_plain
from ...ops.shared_mask import mask_for
from ..frozen import frozen_linear
from .groups import group
from .routes import Routing
from .stacks import Stack

if TYPE_CHECKING:
    from ..layer import LoraLayer
    from ..updates.update import Pair


def linear(layer: LoraLayer, base: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    """Compute a routed linear's output. `base`: the module's own forward."""
    routing = layer.lora_route
    assert routing is not None
    tokens = routing.tokens(layer, x)
    if not tokens:
        return base(x, *args, **kwargs)
    unpaired = routing.unpaired(layer)
    if not unpaired:
        return _pairs(layer, routing, tokens, base, x, *args, **kwargs)
    y0 = base(x, *args, **kwargs)
    y = _pairs(layer, routing, tokens, lambda *_, **__: y0.clone(), x, *args, **kwargs)  # a clone, to be written into
    return routing.add_updates(layer, y, x, unpaired, y0)


def _pairs(
    layer: LoraLayer, routing: Routing, tokens: int, base: Callable[..., Tensor], x: Tensor, *args, **kwargs
) -> Tensor:
    """Compute the output with the updates that are pairs of matrices."""
    plain = needs_plain()
    if not (plain or layer.training or torch.is_grad_enabled()):
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    grouped = None if plain else group(layer, x)
    if grouped is not None and grouped.A is not None and grouped.B is not None:
        mask = mask_for(x, grouped.dropout, layer) if grouped.dropout else None
        y = _writable(layer, base(x, *args, **kwargs))
        if grouped.h is not None:
            rows = y.view(len(grouped.h), -1, y.shape[-1])
            y = layer.lora_gained(rows, rows, grouped.h).view(y.shape)
        return add_low_rank(y, x, grouped.A, grouped.B, grouped.scale, mask)
    modules = layer._modules
    pairs: dict[str, Pair] = {
        c: pair for c in routing.children if c in modules and (pair := modules[c].pair(layer)) is not None
    }
    if not pairs:
        return base(x, *args, **kwargs)
    if plain or (layer.training and any(f.dropout for f in pairs.values())):
        return routing.add_updates(layer, base(x, *args, **kwargs), x, list(pairs))
    if not (
        torch.is_grad_enabled()
        and (x.requires_grad or any(f.A.requires_grad or f.B.requires_grad for f in pairs.values()))
    ):
        return _stacked(layer, routing, tokens, base(x, *args, **kwargs), x)
    if any(f.B.dim() == 3 for f in pairs.values()):  # packed
        return routing.add_updates(layer, base(x, *args, **kwargs), x, list(pairs))
    parts = routing.segments({c: (k, f.scale) for k, (c, f) in enumerate(pairs.items())}, tokens, x)
    factors = [(f.A, f.B) for f in pairs.values()]
    gains = {c: f.gain for c, f in pairs.items() if f.gain is not None}
    frozen = frozen_linear(layer, x) if not gains and not args and not kwargs and layer.lora_plain else None
    if frozen is not None:
        return add_segments(None, x, *frozen, parts, factors)
    y = base(x, *args, **kwargs)
    y = _gained(layer, routing, gains, tokens, y) if gains else _writable(layer, y)
    return add_segments(y, x, None, None, parts, factors)


def _stacked(layer: LoraLayer, routing: Routing, tokens: int, y: Tensor, x: Tensor) -> Tensor:
    """Add the updates from the layer's stack, without gradients."""
    stack = routing.stack(layer, y)
    if stack is None:
        return y
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _with_stack(layer, routing, tokens, stack, y, x)
    return _with_stack(layer, routing, tokens, stack, y, x)


def _with_stack(layer: LoraLayer, routing: Routing, tokens: int, stack: Stack, y: Tensor, x: Tensor) -> Tensor:
    gains = routing.stacked_gains(layer)
    y = _gained(layer, routing, gains, tokens, y) if gains else _writable(layer, y)
    routing.add(stack, tokens, y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype))
    return y


def _writable(layer: LoraLayer, y: Tensor) -> Tensor:
    """Return y as a contiguous tensor that may be written into."""
    fresh = layer.lora_fresh_output and not (y.requires_grad and y.is_leaf)
    return y.contiguous() if fresh else y.clone(memory_format=torch.contiguous_format)


def _gained(layer: LoraLayer, routing: Routing, gains: Mapping[str, Tensor], tokens: int, y: Tensor) -> Tensor:
    """Return y plus each row's h ∘ (y - b), as a new contiguous tensor.

    y: the base's output; `gains`: g [out] of each adapter that has one; `tokens`: of each choice.
    """
    excesses = torch.stack(list(gains.values())) - 1  # [adapters, out]
    h = routing.weights(list(gains), excesses) @ excesses
    rows = y.reshape(len(h), tokens, y.shape[-1])
    return layer.lora_gained(rows, rows, h).view(y.shape)
