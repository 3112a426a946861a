"""An adapted `nn.MultiheadAttention` inside `lorakit.route`: the rows with the same choice are computed together.

Its weights are handed to one function, so rows with different adapters need different weights: one call for each choice
in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..multihead import MultiheadLayer
    from ..updates.update import LiveUpdate
    from .routes import Choice

Inputs = tuple[Tensor, Tensor, Tensor]  # query, key, value
Attention = tuple[Tensor, Tensor | None]  # the output, and the attention weights


def attention(
    layer: MultiheadLayer,
    attend: Callable[..., Attention],
    inputs: Inputs,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    settings: Any,
) -> Attention:
    """Compute a routed attention. `attend`: computes it for some rows, with given updates of both weights.

    Raises StateError for another number of rows than there are choices, and for choices per token.
    """
    routing = layer.lora_route
    assert routing is not None
    axis = 0 if layer.batch_first else 1
    rows = inputs[0].shape[axis] if inputs[0].dim() == 3 else 1
    groups = routing.by_choice(layer, rows, inputs[0].device)

    def of(choice: Choice, *given: Any) -> Attention:
        return attend(*given, settings, _active(layer, choice), _active(layer.out_proj, choice))

    if len(groups) == 1:
        return of(groups[0][0], inputs, key_padding_mask, attn_mask)
    outputs, weights = [], []
    for choice, index in groups:
        some = alike(inputs, lambda x, index=index: x.index_select(axis, index))  # type: ignore[misc]
        padding = None if key_padding_mask is None else key_padding_mask.index_select(0, index)
        y, shares = of(choice, some, padding, _of_rows(attn_mask, index, rows))
        outputs.append(y)
        weights.append(shares)
    back = torch.cat([index for _, index in groups]).argsort()
    y = torch.cat(outputs, axis).index_select(axis, back)
    known = [shares for shares in weights if shares is not None]
    return y, torch.cat(known).index_select(0, back) if known else None


def alike(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Change each input. The same tensor stays the same: torch projects it once then."""
    query, key, value = inputs
    q = change(query)
    k = q if key is query else change(key)
    return q, k, k if value is key else q if value is query else change(value)


def _active(layer: nn.Module, choice: Choice) -> list[tuple[LiveUpdate, float]]:
    children: dict[str, Any] = layer._modules
    return [(children[child], weight) for child, weight in choice if child in children]


def _of_rows(mask: Tensor | None, index: Tensor, rows: int) -> Tensor | None:
    """Return the attention mask of these rows: one mask is for all rows, another has [rows · heads, ...]."""
    if mask is None or mask.dim() < 3:
        return mask
    return mask.unflatten(0, (rows, -1)).index_select(0, index).flatten(0, 1)
