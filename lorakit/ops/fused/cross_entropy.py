"""The cross-entropy of a frozen output layer, as one autograd node that never materializes all logits.

    loss[i] = −log softmax(h[i] Wᵀ + b)[target[i]]        h: [N, in]   W: [vocabulary, in]

    dloss/dh = (softmax(h Wᵀ + b) − onehot(target)) W

W gets no gradient, so a chunk of rows needs its logits only once: the forward computes both the loss and the gradient
from them. Saved for backward is that gradient, as large as h. (Computing the gradient in the forward: Hsu et al. 2024,
Liger Kernel.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import IGNORE_INDEX
from ..autocast import without_autocast

# The size of a chunk (bench/output_loss.py).
BYTES = 1 << 24  # of its float32 logits: larger ones do not fit the cache
ROWS = 256  # at least: with fewer, W is read too often
CHUNKS = 32  # at most: each costs a dozen calls


def reference(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Compute the equation: [N], in float32 at least."""
    logits = F.linear(h, W, bias)
    return F.cross_entropy(logits.to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="none")


def linear_cross_entropy(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the loss of each row, [N], in float32 at least; zero where the target is −100, as in torch.

    h: [N, in], W: [vocabulary, in], targets: [N]. W and the bias get no gradient.
    """
    return _LinearCrossEntropy.apply(h, W, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        precise = torch.promote_types(h.dtype, torch.float32)
        losses = h.new_empty(h.shape[0], dtype=precise)
        gradient = torch.empty_like(h, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        # Two buffers for all chunks: allocating new memory each time would cost as much as the arithmetic.
        rows = min(max(ROWS, BYTES // (4 * W.shape[0]), -(-h.shape[0] // CHUNKS)), h.shape[0])
        buffer = h.new_empty(rows, W.shape[0], dtype=precise)
        buffer_of_h = buffer if h.dtype == precise else h.new_empty(rows, W.shape[0])
        for start in range(0, h.shape[0], max(rows, 1)):
            part = slice(start, start + rows)
            labels = targets[part].clamp_min(0).unsqueeze(1)
            n = labels.shape[0]
            logits, rounded = buffer[:n], buffer_of_h[:n]  # one buffer if h is precise
            _linear(h[part], W, bias, rounded)
            if rounded.dtype != precise:
                logits.copy_(rounded)
            logits.sub_(logits.amax(1, keepdim=True))
            label_logits = logits.gather(1, labels)
            total = logits.exp_().sum(1, keepdim=True)
            torch.sub(total.log(), label_logits, out=losses[part].unsqueeze(1))
            if gradient is not None:
                # softmax − onehot
                logits.div_(total).scatter_add_(1, labels, logits.new_full((), -1.0).expand_as(labels))
                if rounded.dtype != precise:
                    rounded.copy_(logits)
                torch.mm(rounded, W, out=gradient[part])
        ignored = targets == IGNORE_INDEX
        losses.masked_fill_(ignored, 0)
        if gradient is not None:
            gradient.masked_fill_(ignored.unsqueeze(1), 0)
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
