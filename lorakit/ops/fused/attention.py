"""Causal attention on a CPU, as one autograd node with its own backward.

    y = softmax(s · q kᵀ + causal) v        q: [rows, heads, length, size]   k, v: [rows, kv heads, length, size]

The forward is torch's fused kernel, so its output equals the base's bit for bit. The kernel's backward is slow for
short rows in 16 bits (a sixth of a training step with rows of 256 tokens). For these, the probabilities of a block of
queries are recomputed from the kernel's log-sum-exp, and the rest is matrix products over the block's visible keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast

# In 16 bits our blockwise backward beats the kernel's up to this length (0.3 of its time at 96 tokens, 0.6 at 256 and
# 512, 1.0 at 1,024; 8 heads of 64, 1,024 tokens in all, one thread). In float32 the kernel is as fast throughout.
BLOCKWISE_MAX_LENGTH = 512
# Queries per block: small blocks skip more masked positions and stay in the cache, large ones make faster products
# (256 tokens, in ms: 32: 13.9, 64: 14.8, 128: 17.6, 256: 25.3; 512 tokens: 22.6, 18.9, 17.5, 31.6).
BLOCK = 64


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute the equation in plain operations: [rows, heads, length, size]."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute causal attention on a CPU: [rows, heads, length, size]. `scale`: s."""
    return _CausalAttention.apply(q, k, v, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = _spread(k, q), _spread(v, q)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, 0.0, True, attn_mask=None, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        q, k, v, out, log_sum = ctx.saved_tensors
        backward = (
            _blockwise_backward if q.element_size() == 2 and q.shape[2] <= BLOCKWISE_MAX_LENGTH else _kernel_backward
        )
        dq, dk, dv = backward(g, q, _spread(k, q), _spread(v, q), out, log_sum, ctx.scale)
        if k.shape[1] != q.shape[1]:  # grouped-query attention
            dk, dv = (t.unflatten(1, (k.shape[1], -1)).sum(2) for t in (dk, dv))
        return dq, dk, dv, None


def _spread(t: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values for each query head."""
    groups = q.shape[1] // t.shape[1]
    return t if groups == 1 else t.repeat_interleave(groups, 1)


def _kernel_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, log_sum, 0.0, True, attn_mask=None, scale=scale
    )


def _blockwise_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v: [rows, heads, length, size]. log_sum: [rows, heads, length]."""
    rows, heads, length, size = q.shape
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    PdP = (g.to(wide) * out).sum(-1).to(dtype).reshape(rows * heads, length, 1)  # Σ P · dP of each query
    minus_log_sum = log_sum.reshape(rows * heads, length, 1).neg()
    q, k, v, g = (t.reshape(rows * heads, length, size) for t in (q, k, v, g))
    # Scores in float32: in 16 bits, the gradients would lose half a digit.
    q_wide, k_wide = q.to(wide) * scale, k.to(wide).transpose(1, 2)
    v_transposed = v.transpose(1, 2)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        exact = torch.baddbmm(minus_log_sum[:, start:end], q_wide[:, start:end], k_wide[:, :, :end]).exp_()
        exact[:, :, start:end].tril_()
        P, g_block = exact.to(dtype), g[:, start:end]  # [rows · heads, block, end]
        dv[:, :end].baddbmm_(P.transpose(1, 2), g_block)
        dS = torch.bmm(g_block, v_transposed[:, :, :end]).sub_(PdP[:, start:end]).mul_(P)
        dq[:, start:end].baddbmm_(dS, k[:, :end], beta=0, alpha=scale)
        dk[:, :end].baddbmm_(dS.transpose(1, 2), q[:, start:end], alpha=scale)
    return tuple(t.view(rows, heads, length, size) for t in (dq, dk, dv))
