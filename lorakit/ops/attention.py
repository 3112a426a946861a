"""Causal attention with rotary positions (Su et al. 2021) on a CPU, as one autograd node with a backward of its own.

    q', k' = rope(q), rope(k)        y = softmax(s · q' k'ᵀ + causal) v        q: [rows, length, heads, size]   k, v: [rows, length, kv heads, size]

The forward is torch's fused kernel, so its bits are the base's. The kernel's backward is slow for short rows in 16 bits (a sixth of a
whole training step of rows of 256 tokens). There, the probabilities of a block of queries are made again from the kernel's log-sum-exp,
and the rest is matrix products over the keys that the block may see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast

# Rows up to so many tokens, in 16 bits, have their backward made here: 96 tokens take 0.3 of the kernel's time, 256 and 512 0.6, 1,024
# 1.0; in float32 the kernel is as fast throughout (8 heads of 64, 1,024 tokens in all, one thread).
LONGEST = 512
# Queries a block: small ones skip more of what the causal mask hides and stay in the cache, large ones are better products (256 tokens,
# in ms: 32: 13.9, 64: 14.8, 128: 17.6, 256: 25.3; 512 tokens: 22.6, 18.9, 17.5, 31.6).
BLOCK = 64


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotated(x) · sin with rotated(x) = [-x₂, x₁], its halves; the same bits as written so. cos, sin: [rows or 1, length, 1, size]."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].sub_(x[..., half:] * sin[..., :half])
    out[..., half:].add_(x[..., :half] * sin[..., half:])
    return out


def rope_backward(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of rope's x."""
    half = g.shape[-1] // 2
    out = g * cos
    out[..., :half].add_(g[..., half:] * sin[..., half:])
    out[..., half:].sub_(g[..., :half] * sin[..., :half])
    return out


def reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """The equation, in plain operations; [rows, length, heads, size]."""
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    q, k, v = (
        t.transpose(1, 2) for t in (rope(q, cos, sin), rope(k, cos, sin).repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    )
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rope_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """[rows, length, heads, size]; cos, sin: [rows or 1, length, 1, size]."""
    return _RopeAttention.apply(q, k, v, cos, sin, scale)


class _RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        heads = [t.transpose(1, 2) for t in (q, _spread(k, q), _spread(v, q))]
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, attn_mask=None, scale=scale)
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, cos, sin, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        q, k, v, cos, sin, out, log_sum = ctx.saved_tensors
        made = _blockwise_backward if q.element_size() == 2 and q.shape[1] <= LONGEST else _kernel_backward
        dq, dk, dv = made(g, q, _spread(k, q), _spread(v, q), out, log_sum, ctx.scale)
        if k.shape[2] != q.shape[2]:  # queries that share keys
            dk, dv = (t.unflatten(2, (k.shape[2], -1)).sum(3) for t in (dk, dv))
        return rope_backward(dq, cos, sin), rope_backward(dk, cos, sin), dv, None, None, None


def _spread(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values once for each head of q."""
    groups = q.shape[2] // t.shape[2]
    return t if groups == 1 else t.repeat_interleave(groups, 2)


def _kernel_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float) -> tuple[Tensor, ...]:
    heads = [t.transpose(1, 2) for t in (g, q, k, v, out)]
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, log_sum, 0.0, True, attn_mask=None, scale=scale)
    return tuple(t.transpose(1, 2) for t in made)


def _blockwise_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The gradients of q, k and v: [rows, length, heads, size]. log_sum: [rows, heads, length]."""
    rows, length, heads, size = q.shape
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    along = (g.to(wide) * out).sum(-1).to(dtype)  # [rows, length, heads]: Σ P · dP of each query
    along = along.transpose(1, 2).reshape(rows * heads, length, 1)
    minus_log_sum = log_sum.reshape(rows * heads, length, 1).neg()
    q, k, v, g = (t.transpose(1, 2).reshape(rows * heads, length, size) for t in (q, k, v, g))
    # Scores in float32: rounded to 16 bits they would cost the gradients half a digit.
    q_wide, k_wide = q.to(wide) * scale, k.to(wide).transpose(1, 2)
    v_across = v.transpose(1, 2)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        exact = torch.baddbmm(minus_log_sum[:, start:end], q_wide[:, start:end], k_wide[:, :, :end]).exp_()
        exact[:, :, start:end].tril_()
        P, g_block = exact.to(dtype), g[:, start:end]  # [rows · heads, block, end]
        dv[:, :end].baddbmm_(P.transpose(1, 2), g_block)
        dS = torch.bmm(g_block, v_across[:, :, :end]).sub_(along[:, start:end]).mul_(P)
        dq[:, start:end].baddbmm_(dS, k[:, :end], beta=0, alpha=scale)
        dk[:, :end].baddbmm_(dS.transpose(1, 2), q[:, start:end], alpha=scale)
    return tuple(t.view(rows, heads, length, size).transpose(1, 2) for t in (dq, dk, dv))
