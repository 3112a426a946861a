"""The cross-entropy of a frozen output layer, as one autograd node that never holds all logits.

    loss[i] = −log softmax(h[i] Wᵀ + b)[target[i]]        h: [N, in]   W: [vocabulary, in]

    dloss/dh = (softmax(h Wᵀ + b) − onehot(target)) W

W takes no gradient, so a chunk of rows needs its logits only once: the forward makes the loss and the gradient from them and forgets
them. Kept for backward is that gradient, as large as h. (Computing the gradient in the forward: Hsu et al. 2024, Liger Kernel.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast

LEFT_OUT = -100  # F.cross_entropy's own default

# Rows of a chunk. Fewer read W too often, more leave the cache: forward and backward of 512 rows, vocabulary 8,192, two Zen 4 cores, over
# all logits at once: width 256 fp32 0.43, bf16 0.54; width 512 0.90 and 1.00; width 1024 0.96 and 0.74.
ROWS = 256
ROWS_ELSEWHERE = 2048  # on an accelerator; not measured


def reference(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The equation; [N], in float32 at least."""
    logits = F.linear(h, W, bias)
    return F.cross_entropy(logits.to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="none")


def linear_cross_entropy(h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The loss of each row, [N], in float32 at least; h: [N, in], targets: [N], zero for those that are −100, as torch has it.

    W and the bias take no gradient.
    """
    return _LinearCrossEntropy.apply(h, W, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        precise = torch.promote_types(h.dtype, torch.float32)
        losses = h.new_empty(h.shape[0], dtype=precise)
        gradient = torch.empty_like(h, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        rows = ROWS if h.device.type == "cpu" else ROWS_ELSEWHERE
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            wanted = targets[part].clamp_min(0).unsqueeze(1)
            logs = F.log_softmax(F.linear(h[part], W, bias).to(precise), dim=-1)
            torch.neg(logs.gather(1, wanted).squeeze(1), out=losses[part])
            if gradient is not None:
                shares = logs.exp_()  # the softmax
                shares.scatter_add_(1, wanted, shares.new_full((), -1.0).expand_as(wanted))
                torch.mm(shares.to(h.dtype), W, out=gradient[part])
        left_out = targets == LEFT_OUT
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
