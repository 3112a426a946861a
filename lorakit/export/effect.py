"""What an adapter does to a base's weights, in plain numpy float64 and independent of lorakit's own code.

    LoRA     ΔW = s · B A                                   Hu et al. 2021
    LoHa     ΔW = s · (W1a W1b) ∘ (W2a W2b)                 Hyeon-Woo et al. 2022
    LoKr     ΔW = s · W1 ⊗ W2                               Yeh et al. 2024
    Tucker   T ×₁ Wa ×₂ Wb in place of a product Wa Wb      T [r, r, *k], Wa [r, out], Wb [r, in]

ΔW is always a matrix [out, in·k...], whatever the layout of the base's weight. A DoRA (Liu et al. 2024) also has a
magnitude m: W' = m (W + ΔW) / ‖W + ΔW‖.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Delta = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Effect:
    """The change to one module."""

    delta: Delta | None = None  # lazy, so that only one ΔW is in memory at a time
    magnitude: np.ndarray | None = None  # [out, 1] or [1, in]; MLX: [rows], one per row of the stored weight
    bias: np.ndarray | None = None  # added to the bias


@dataclass(frozen=True)
class Content:
    """Everything a file or an adapter does to a base. `saved`: parameters it replaces."""

    effects: Mapping[str, Effect]
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)


def low_rank(B: np.ndarray, A: np.ndarray, scale: float) -> np.ndarray:
    """Return s · B A, [out, in·k]. For a grouped convolution B is [out, r/g]: block j of B's rows multiplies block j of
    A.
    """
    A, B = _matrix(A), scale * _matrix(B)
    groups = A.shape[0] // B.shape[1]
    if groups == 1:
        return B @ A
    return np.concatenate([b @ a for b, a in zip(np.split(B, groups), np.split(A, groups), strict=True)])


def hadamard(parts: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """Return ΔW of a LoHa. `parts`: w1a, w1b, w2a, w2b, and t1, t2 in Tucker form."""
    first, second = (_product(parts[f"w{i}a"], parts[f"w{i}b"], parts.get(f"t{i}")) for i in (1, 2))
    return scale * first * second


def kronecker(parts: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """Return ΔW of a LoKr. `parts`: w1 or w1a and w1b; w2 or w2a and w2b, and t2 in Tucker form."""
    first = _matrix(parts["w1"]) if "w1" in parts else _product(parts["w1a"], parts["w1b"])
    second = _matrix(parts["w2"]) if "w2" in parts else _product(parts["w2a"], parts["w2b"], parts.get("t2"))
    return scale * np.kron(first, second)


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None = None) -> np.ndarray:
    if core is None:
        return _matrix(a) @ _matrix(b)
    full = np.einsum("ij...,ip,jq->pq...", core.astype(np.float64), a.astype(np.float64), b.astype(np.float64))
    return full.reshape(full.shape[0], -1)


def _matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1).astype(np.float64)
