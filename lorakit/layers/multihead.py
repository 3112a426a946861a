"""Adapted attention of torch's own kind, `nn.MultiheadAttention` (OpenCLIP, torch's and torchvision's transformers).

    q, k, v = x_q W_qᵀ + b_q, x_k W_kᵀ + b_k, x_v W_vᵀ + b_v        in_proj_weight = [W_q; W_k; W_v]: [3·dim, dim]
    y = attention(q, k, v) W_oᵀ + b_o                               out_proj.weight = W_o

Torch hands both weights to one function, so there is no linear whose output an update could be added to. The updates of
the module itself are of in_proj_weight, those of its child out_proj of W_o, as in PEFT; the function gets W + ΔW, which
each forward computes anew. The base's weights are never written to (PEFT merges and unmerges around each call).

Dropout on the input of a low-rank branch is, in a branch that is part of the weight, dropout of the weight's inputs:
one mask for all positions of the batch. (PEFT has none here.)

In evaluation the base alone may take torch's fused kernel, which rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gain import excess
from ..ops.packed import expand_packed
from .batched.attention_rows import alike, attention
from .layer import LoraLayer
from .linear import LinearLayer
from .packed import PackedLayer
from .updates.update import LiveUpdate

Active = list[tuple[LiveUpdate, float]]


class MultiheadLayer(LinearLayer):
    """The mixin for attentions with one weight for q, k and v. To an update it is a linear [dim -> 3·dim]."""

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    out_proj: nn.Linear

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.in_proj_weight

    def lora_sizes(self) -> tuple[int, int]:
        return self.embed_dim, 3 * self.embed_dim

    def lora_token_rows(self) -> str | None:
        return "it is an attention"

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        settings = (need_weights, average_attn_weights, is_causal)
        if self.lora_route is not None:
            return attention(self, self._attend, (query, key, value), key_padding_mask, attn_mask, settings)
        own, others = self.lora_in_use(), self._of_output()
        return self._attend((query, key, value), key_padding_mask, attn_mask, settings, own, others)

    def _of_output(self) -> Active:
        """Return the updates of out_proj that are in use."""
        return self.out_proj.lora_in_use() if isinstance(self.out_proj, LoraLayer) else []

    def _attend(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        settings: tuple[bool, bool, bool],
        own: Active,
        others: Active,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention with these updates of in_proj_weight and of out_proj's weight."""
        need_weights, average, is_causal = settings
        if not own and not others:
            base: Callable[..., Any] = super(LoraLayer, self).forward
            return base(*inputs, key_padding_mask, need_weights, attn_mask, average, is_causal)
        transposed = self.batch_first and inputs[0].dim() == 3
        if transposed:
            inputs = alike(inputs, lambda x: x.transpose(0, 1))
        y, weights = F.multi_head_attention_forward(
            *inputs,
            self.embed_dim,
            self.num_heads,
            changed(self, own),
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            changed(self.out_proj, others),
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average,
            is_causal=is_causal,
        )
        return y.transpose(0, 1) if transposed else y, weights


class PackedMultiheadLayer(PackedLayer, MultiheadLayer):
    """The mixin for attentions of which only some of q, k and v are adapted (`LoraConfig.packed`)."""


def changed(layer: nn.Module, active: Active) -> Tensor:
    """Return the layer's weight plus these updates, as a new tensor; without any the weight itself."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    total = weight
    for update, share in active:
        assert isinstance(layer, LoraLayer)
        total = total + _delta(layer, update, share, weight)
    return total


def _delta(layer: LoraLayer, update: LiveUpdate, share: float, weight: Tensor) -> Tensor:
    """Return `share` · ΔW in the weight's dtype. Gradients reach the update's parameters."""
    pair = update.pair(layer)
    with torch.autocast(weight.device.type, enabled=False):
        if pair is None:  # any other kind: its change of the identity
            identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            bias = getattr(layer, "bias", None)  # part of the output that an update sees
            y0 = weight.detach().T if bias is None else weight.detach().T + bias.detach()
            return share * update.change(layer, identity, y0).T
        A, B = pair.A, pair.B
        if isinstance(layer, PackedLayer) and B.dim() == 3:
            B = expand_packed(B, layer.lora_parts)
        if pair.dropout and update.training:
            A = A * F.dropout(A.new_ones(A.shape[1]), pair.dropout)
        delta = (B * (pair.scale * share)) @ A.to(B.dtype)
        if pair.gain is not None:
            delta = delta + excess(pair.gain, share)[:, None] * weight
        return delta.to(weight.dtype)
