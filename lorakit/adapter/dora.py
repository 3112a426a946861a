"""The change that a DoRA makes (Liu et al. 2024), which depends on the weight.

ΔW = m (W + s · B A) / ‖W + s · B A‖ - W        ‖·‖: of each output's row, m: [out, 1]; or of each input's column, m:
                                                [1, in]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .update import Read, Rows


def dora_rows(low: Rows, magnitude: Tensor, transposed: bool, read: Read | None) -> Rows:
    """ΔW by blocks of rows of the stored weight. `low`: s · B A, likewise.

    A norm that runs across the blocks (of outputs of a weight stored as [in, out], or of inputs) takes one more reading
    of the weight.
    """
    by_output = magnitude.shape[0] > 1 or magnitude.shape == (1, 1)
    wanted = magnitude.detach().double().flatten()
    if by_output != transposed:  # a norm of each stored row: it is whole in its block

        def change(rows: slice, block: Tensor) -> Tensor:
            V = block.double() + low(rows, block)
            return V * _ratio(wanted[rows, None], V.norm(dim=1, keepdim=True)) - block

        return change
    assert read is not None
    total = torch.zeros(wanted.numel(), dtype=torch.float64, device=wanted.device)
    for rows, block in read():
        total += (block.double() + low(rows, block)).square().sum(0)
    ratio = _ratio(wanted, total.sqrt())
    return lambda rows, block: (block.double() + low(rows, block)) * ratio - block


def _ratio(wanted: Tensor, norm: Tensor) -> Tensor:
    """What brings a norm to the wanted one; a row of zeros stays one."""
    return torch.where(norm > 0, wanted / norm, 0)
