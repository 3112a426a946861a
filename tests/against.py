"""What the tests of the fast ops share: random projections, gradients side by side, and how far a result is from
float64 maths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorakit.ops.dropout import Mask, draw_mask, draw_seed, masked
from lorakit.ops.projections import Projection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection(
    size_in: int, size_out: int, rank: int | None, bias: bool = True, seed: int = 0, scale: float = 0.7
) -> Projection:
    """A random one in float64; rank None for one without an update."""
    W, b = randn(size_out, size_in, seed=seed) / size_in**0.5, randn(size_out, seed=seed + 1) if bias else None
    if rank is None:
        return Projection(W, b, None, None, 1.0)
    return Projection(
        W, b, randn(rank, size_in, seed=seed + 2) / size_in**0.5, randn(size_out, rank, seed=seed + 3), scale
    )


def as_dtype(p: Projection, dtype: torch.dtype, factors: torch.dtype | None = None, trained: str = "AB") -> Projection:
    """A copy with its weight in `dtype`, and its factors, leaves that take gradients if `trained` names them, in
    `factors`.
    """
    A, B = (
        None if t is None else t.detach().to(factors or dtype, copy=True).requires_grad_(name in trained)
        for name, t in (("A", p.A), ("B", p.B))
    )
    return Projection(p.W.to(dtype), None if p.bias is None else p.bias.to(dtype), A, B, p.scale)


def wanted(*tensors: Tensor | Sequence[Projection]) -> list[Tensor]:
    """Those of the tensors and of the projections' factors that take a gradient."""
    every = [t for one in tensors for t in ([one] if isinstance(one, Tensor) else [f for p in one for f in (p.A, p.B)])]
    return [t for t in every if t is not None and t.requires_grad]


def gradients(outs: Tensor | Sequence[Tensor], of: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Of a sum of the outputs with random weights."""
    outs = [outs] if isinstance(outs, Tensor) else outs
    total = sum((o * randn(*o.shape, seed=seed + i).to(o.dtype)).sum() for i, o in enumerate(outs))
    return list(torch.autograd.grad(total, of, retain_graph=True))


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The relative error of several tensors in all."""
    off = sum(float((f.detach().double() - e.detach()).square().sum()) for f, e in zip(found, exact, strict=True))
    return (off / sum(float(e.detach().square().sum()) for e in exact)) ** 0.5


def assert_as_exact(
    fast: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], factor: float = 1.25
) -> None:
    """Whether the fast form is about as near to float64 maths as the plain lines are. In float32 the order of a sum
    decides alone.
    """
    ours, theirs = error(fast, exact), error(plain, exact)
    one = torch.finfo(fast[0].dtype).eps
    assert ours <= factor * theirs + (one if fast[0].dtype == torch.float32 else 0.1 * one), (
        f"error {ours:.3g}, of the plain lines {theirs:.3g}"
    )


def seeds_of(draws: int, seed: int = 3) -> list[int]:
    """The dropout seeds that the next calls draw after `torch.manual_seed(seed)`, which is set again."""
    torch.manual_seed(seed)
    drawn = [draw_seed() for _ in range(draws)]
    torch.manual_seed(seed)
    return drawn


def keep(x: Tensor, mask: Mask) -> Tensor:
    """1 (kept) or 0 for each element of x, in its type."""
    flat = torch.ones_like(x, memory_format=torch.contiguous_format).reshape(-1, x.shape[-1])
    return masked(flat, mask).view(x.shape)


def mask_of(x: Tensor, p: float, seed: int = 1) -> Mask | None:
    """The mask of a seed for x as rows; None without dropout."""
    return draw_mask(x.reshape(-1, x.shape[-1]), p, seed) if p else None


def kept(forward: Callable[[], object], known: Sequence[Tensor | None]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of everything that is kept for backward, each storage once, without the `known` tensors."""
    skip = {t.untyped_storage().data_ptr() for t in known if t is not None}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            assert t.untyped_storage().nbytes() == t.nbytes, "a part that keeps a larger whole alive"
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sorted(((t.dtype, tuple(t.shape)) for t in found.values()), key=str)
