"""Adapters made of random numbers, of every kind, and their ΔW in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(hash(shape) % 10_000 + 77 * seed)
    return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)


def factors(
    kind: str = "linear",
    rank: int = 4,
    alpha: float = 6.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options,
) -> lk.Factors:
    shapes = {
        "linear": ((rank, 15), (12, rank)),
        "embedding": ((rank, 19), (14, rank)),
        "conv": ((rank, 5, 3, 3), (16, rank, 1, 1)),
    }
    A, B = (numbers(*shape, seed=seed, dtype=dtype) for shape in shapes[kind])
    return lk.Factors(A, B, alpha, kind, **options)


def packed(rank: int = 2, alpha: float = 6.0, seed: int = 0) -> lk.Factors:
    """Of three parts, the first and the last."""
    B = torch.zeros(12, 2 * rank)
    B[:4, :rank], B[8:, rank:] = numbers(4, rank, seed=seed), numbers(4, rank, seed=seed + 1)
    return lk.Factors(numbers(2 * rank, 9, seed=seed), B, alpha, parts=(True, False, True))


def hadamard(seed: int = 0) -> Loha:
    return Loha(
        numbers(20, 2, seed=seed),
        numbers(2, 18, seed=seed),
        numbers(20, 2, seed=seed + 1),
        numbers(2, 18, seed=seed + 1),
        1.0,
    )


def kronecker(seed: int = 0) -> Lokr:
    return Lokr(3.0, w1=numbers(4, 3, seed=seed), w2a=numbers(5, 2, seed=seed), w2b=numbers(2, 6, seed=seed))


def adapter(seed: int = 0, rank: int = 4, others: bool = False, rslora: bool = False) -> lk.Adapter:
    """A module of each kind. `rslora`: one of them is scaled by alpha / √rank, unlike the others."""
    made = {
        "layers.0.q": factors(rank=rank, seed=seed),
        "layers.1.q": factors(rank=rank + 1, alpha=3.0, seed=seed + 1),
        "layers.0.conv": factors("conv", rank=rank, seed=seed),
        "embed": factors("embedding", rank=rank, seed=seed),
        "layers.0.c_fc": factors(rank=rank, seed=seed + 2, transposed=True),
        "layers.0.qkv": packed(seed=seed),
        "layers.1.r": factors(rank=rank, seed=seed + 3, rslora=rslora),
    }
    whole = {
        "layers.1.loha": hadamard(seed),
        "layers.1.lokr": kronecker(seed),
        "layers.1.full": Dense(numbers(7, 9, seed=seed)),
    }
    return lk.Adapter(lk.LoraConfig(rank=rank, alpha=6.0, targets=["q"]), made | (whole if others else {}))


def exact(update) -> Tensor:
    """ΔW in float64, in the weight's layout."""
    if isinstance(update, lk.Factors):
        return type(update)(**{**update.__dict__, "A": update.A.double(), "B": update.B.double()}).delta()
    return type(update)(**{**update.__dict__, **{n: t.double() for n, t in update.tensors().items()}}).delta()


def deltas(adapter: lk.Adapter) -> dict[str, Tensor]:
    return {m: exact(u) for m, u in adapter.updates.items()}
