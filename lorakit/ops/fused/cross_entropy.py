"""The cross-entropy of a frozen output layer, as one autograd node that never holds all logits.

    loss[i] = −log softmax(h[i] Wᵀ + b)[target[i]]        h: [N, in]   W: [vocabulary, in]

    dloss/dh = (softmax(h Wᵀ + b) − onehot(target)) W

W takes no gradient, so a chunk of rows needs its logits only once: the forward makes the loss and the gradient from
them and forgets them. Kept for backward is that gradient, as large as h. (Computing the gradient in the forward: Hsu et
al. 2024, Liger Kernel.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import IGNORE_INDEX
from ..autocast import without_autocast

# A chunk is as many rows as have float32 logits of so many bytes, more leave the cache; but at least so many rows,
# fewer read W too often (bench/output_loss.py); and there are at most so many chunks, each costs a dozen calls.
BYTES = 1 << 24
ROWS = 256
CHUNKS = 32


def reference(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The equation; [N], in float32 at least."""
    logits = F.linear(h, W, bias)
    return F.cross_entropy(logits.to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="none")


def linear_cross_entropy(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The loss of each row, [N], in float32 at least; h: [N, in], targets: [N], zero for those that are −100, as torch
    has it.

    W and the bias take no gradient.
    """
    return _LinearCrossEntropy.apply(h, W, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        precise = torch.promote_types(h.dtype, torch.float32)
        losses = h.new_empty(h.shape[0], dtype=precise)
        gradient = torch.empty_like(h, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        # Two buffers for all chunks: memory that is new each time costs as much as the arithmetic.
        rows = min(max(ROWS, BYTES // (4 * W.shape[0]), -(-h.shape[0] // CHUNKS)), h.shape[0])
        buffer = h.new_empty(rows, W.shape[0], dtype=precise)
        buffer_of_h = buffer if h.dtype == precise else h.new_empty(rows, W.shape[0])
        for start in range(0, h.shape[0], max(rows, 1)):
            part = slice(start, start + rows)
            wanted = targets[part].clamp_min(0).unsqueeze(1)
            n = wanted.shape[0]
            logits, made = buffer[:n], buffer_of_h[:n]
            _linear(h[part], W, bias, made)
            if made.dtype != precise:
                logits.copy_(made)
            logits.sub_(logits.amax(1, keepdim=True))
            of_wanted = logits.gather(1, wanted)
            total = logits.exp_().sum(1, keepdim=True)
            torch.sub(total.log(), of_wanted, out=losses[part].unsqueeze(1))
            if gradient is not None:
                # softmax − onehot
                logits.div_(total).scatter_add_(1, wanted, logits.new_full((), -1.0).expand_as(wanted))
                if made.dtype != precise:
                    made.copy_(logits)
                torch.mm(made, W, out=gradient[part])
        left_out = targets == IGNORE_INDEX
        losses.masked_fill_(left_out, 0)
        if gradient is not None:
            gradient.masked_fill_(left_out.unsqueeze(1), 0)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * g.unsqueeze(1)).to(gradient.dtype) if gradient is not None else None, None, None, None


def _linear(x: Tensor, W: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, W.mT, out=out)
    else:
        torch.addmm(bias, x, W.mT, out=out)
