"""Plug our attention backward for 16 bits on a CPU (see `ops.fused.attention`) into transformers' attention interface.

`use` switches a model from "sdpa" to the implementation named below, `leave` switches it back. Where our backward does
not apply, the implementation calls "sdpa". It is registered as a mask function too: otherwise transformers would pass
no mask, and padding would be attended to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.fused.attention import causal_attention
from ...ops.linear import needs_plain

NAME = "lorakit_sdpa"
# Arguments of the interface that do not change what plain attention computes.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
    "output_attentions",
    "sliding_window",
}


def register() -> None:
    """Register the implementation with transformers, once per process."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(NAME, forward)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use(model: nn.Module) -> bool:
    """Switch a transformers model from "sdpa" to our backward, if that can apply. Returns whether it did."""
    if why_not(model) is not None:
        return False
    register()
    _switch(model, NAME)
    return _implementations(model) == {NAME}


def leave(model: nn.Module) -> None:
    """Undo `use`."""
    if NAME in _implementations(model):
        _switch(model, "sdpa")


def _switch(model: Any, implementation: str) -> None:
    """Set a transformers model's attention implementation."""
    model.set_attn_implementation(implementation)


def is_used(model: nn.Module) -> bool:
    """Whether the model uses our implementation."""
    return NAME in _implementations(model)


def why_not(model: nn.Module) -> str | None:
    """Say why our backward cannot be used in this model; None if it can."""
    if not _implementations(model):
        return "the model does not use transformers' attention interface"
    if is_used(model):
        return None
    if _implementations(model) != {"sdpa"}:
        return f"the attention is {', '.join(sorted(map(str, _implementations(model))))}; expected sdpa"
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)):
        return f"{type(model).__name__} does not support transformers' attention interface"
    # "meta" is accepted, for `lorakit plan`.
    parameter = next((p for p in model.parameters() if p.dtype.is_floating_point), None)
    if parameter is None or parameter.device.type not in ("cpu", "meta"):
        return "only for CPUs"
    if parameter.element_size() != 2:
        return "only for 16 bits; in float32 torch's own backward is as fast"
    if not any(getattr(m, "is_causal", False) for m in model.modules()):
        return "its attention is not causal"
    unknown = next((child for m in model.modules() if (child := _unknown_child(m)) is not None), None)
    return None if unknown is None else f"its attention contains {unknown}, which the fused form does not support"


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Implement transformers' interface. query: [rows, heads, length, size], rotated. Returns the output [rows, length,
    heads, size], and no attention weights.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if (
        _applies(query, key, value, attention_mask, dropout, causal, kwargs)
        and sdpa.__module__ == "transformers.integrations.sdpa_attention"
    ):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None
    return sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _applies(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, kwargs: dict[str, Any]
) -> bool:
    return (
        mask is None  # sliding windows, padding and packed rows have an explicit mask
        and causal
        and not dropout
        and q.device.type == "cpu"
        and q.shape[2] == k.shape[2] > 1
        and q.shape[3] == v.shape[3]
        and q.numel() > 0
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and all(name in _HARMLESS or value is None for name, value in kwargs.items())
        and torch.backends.cuda.flash_sdp_enabled()  # `sdpa_kernel` may select another one, on a CPU too
        and not torch.is_autocast_enabled("cpu")
        and not needs_plain()
    )


def _implementations(model: nn.Module) -> set[str | None]:
    """Return the attention implementations of a transformers model and all models in it; empty for other models."""
    if not hasattr(model, "set_attn_implementation"):
        return set()
    configs = [getattr(m, "config", None) for m in model.modules() if hasattr(m, "set_attn_implementation")]
    return {getattr(config, "_attn_implementation", None) for config in configs}


def _unknown_child(module: nn.Module) -> str | None:
    """Find a child of an attention module other than linears, norms and dropout. An indexer of keys, for instance,
    works only with implementation names that it knows.
    """
    if not hasattr(module, "is_causal") or not any(isinstance(child, nn.Linear) for child in module.children()):
        return None
    for name, child in module.named_children():
        plain = isinstance(child, nn.Linear | nn.Dropout | nn.Identity | nn.LayerNorm)
        if not plain and (
            child._modules
            or len(child._parameters) > 2
            or any(p is not None and p.dim() > 1 for p in child.parameters())
        ):
            return f"'{name}' ({type(child).__name__})"
    return None
