"""Products of tokens with the matrices of the experts that they were routed to (Shazeer et al. 2017).

    y[i] = W[e(i)] x[i]        x: [S, in]   W: [E, out, in], or [E, in, out] if transposed   y: [S, out]

S counts pairs of a token and an expert, sorted by expert, so that each expert's pairs are adjacent. A low-rank update
is two such products, with A [E, r, in] and B [E, out, r]: no expert's W + ΔW is ever computed.

`reference` is that line. `product` computes the same with torch's grouped product, which waits for no offsets on a GPU,
or where that does not exist with one matrix product for each expert.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import is_casting
from .linear import needs_plain

# Bytes that the strides of a grouped product's matrices must be a multiple of.
ALIGNMENT = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Routed:
    """Pairs of a token and an expert, sorted by expert. `token`, `expert`: [S]; `order` [S]: the position of each pair
    before sorting; `experts`: E.
    """

    token: Tensor
    expert: Tensor
    order: Tensor
    experts: int

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routed:
        """Sort the choices of a router. `index`: [tokens, k], each token's experts; `experts`: E."""
        expert, order = torch.sort(index.reshape(-1), stable=True)
        return cls(torch.div(order, index.shape[-1], rounding_mode="floor"), expert, order, experts)

    @cached_property
    def ends(self) -> Tensor:
        """Where each expert's pairs end: [E], int32."""
        # histc instead of bincount, which a GPU has to wait for; on the CPU it takes floats only.
        values = self.expert.float() if self.expert.device.type in ("cpu", "mps") else self.expert.int()
        return torch.histc(values, bins=self.experts, min=0, max=self.experts - 1).cumsum(0, dtype=torch.int32)

    def of_pairs(self, chosen: Tensor) -> Routed:
        """Return only some of the pairs. `chosen`: their indices [n], ascending."""
        return Routed(self.token[chosen], self.expert[chosen], self.order[chosen], self.experts)

    def summed(self, y: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum over each token's experts: [tokens, out]. y: [S, out], sorted; `weights`: [tokens,
        k], as the router gave them.
        """
        weighted = y * weights.reshape(-1)[self.order].unsqueeze(-1)
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=y.device)
        # A sum over adjacent rows, not index_add_, which adds in another order each time on a GPU.
        return weighted[back].view(*weights.shape, -1).sum(dim=1)


def reference(x: Tensor, W: Tensor, expert: Tensor, transposed: bool = False) -> Tensor:
    """Return W[e(i)] x[i]: [S, out]. It copies a matrix for each pair."""
    own = W.to(x.dtype)[expert]
    return torch.bmm(x.unsqueeze(1), own if transposed else own.mT).squeeze(1)


def product(x: Tensor, W: Tensor, routed: Routed, transposed: bool = False) -> Tensor:
    """Return W[e(i)] x[i], [S, out], in x's dtype. `transposed`: W is [E, in, out]."""
    own = W.to(x.dtype)
    own = own if transposed else own.mT  # [E, in, out]
    if _is_grouped(x, own):
        return F.grouped_mm(x, own, offs=routed.ends)
    return _each(x, own, routed)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float, routed: Routed) -> Tensor:
    """Return s · B[e(i)] A[e(i)] x[i]: [S, out]. x: [S, in]   A: [E, r, in]   B: [E, out, r]."""
    missing = -A.shape[1] % (ALIGNMENT // x.element_size())
    if missing and _supports(x):
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))  # small copies, so that the products are grouped
    down = product(x, A, routed)  # [S, r]
    return product(down if scale == 1 else down * scale, B, routed)


def _supports(x: Tensor) -> bool:
    """Whether torch has grouped products of this dtype on this device, and nothing compiles or transforms them."""
    if needs_plain() or x.dtype not in _DTYPES or not hasattr(F, "grouped_mm"):
        return False
    return x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))


def _is_grouped(x: Tensor, W: Tensor) -> bool:
    """W: [E, in, out], in any memory layout."""
    least = ALIGNMENT // x.element_size()
    return _supports(x) and not any(size % least for size in W.shape[1:])


@torch.compiler.disable  # the number of an expert's tokens is a value, which no graph has
def _each(x: Tensor, W: Tensor, routed: Routed) -> Tensor:
    """The same, expert by expert. W: [E, in, out]."""
    parts, start = [], 0
    with torch.autocast(x.device.type, enabled=False) if is_casting(x) else nullcontext():
        for own, end in zip(W, routed.ends.tolist(), strict=True):
            if end > start:
                parts.append(x[start:end] @ own)
            start = end
        return torch.cat(parts) if parts else x.new_zeros(0, W.shape[2])
