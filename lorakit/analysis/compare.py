"""Compare two adapters: how similar their updates are, and how much they interfere when both are active.

    cosine               ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖)
    principal angles     between their input subspaces (V), and between their output subspaces (U)
    φ(A, B, i, j)        ‖U_A^iᵀ U_B^j‖_F² / min(i, j) (Hu et al. 2021, section 7.2): 0 for orthogonal, 1 for contained
                         subspaces, max(i, j) / width for random ones
    interference         what B adds to A's effect on A's inputs, relative to that effect (`Interference`)

Everything is computed from singular values and vectors: no [out, in] matrix is formed for a low-rank update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.algebra.compatible import base_differences
from ..adapter.algebra.product import inner, matrix, separate, size_of
from ..adapter.algebra.spectrum import Spectrum, decompose
from ..adapter.update import LowRank, Update
from ..checkpoint.weights import open_weights
from ..errors import AdapterError, TargetError, did_you_mean, listing
from ..module_names import matches
from .amplification import Amplification, amplification

Of = Literal["A", "B", "right", "left"]
MOST_SHOWN = 4  # by default, φ is computed for the modules with the largest updates, at most this many


@dataclass(frozen=True)
class Interference:
    """How adapter B changes the effect of adapter A in one module, if both are active.

    change       ‖ΔW_B x‖ / ‖ΔW_A x‖ (root mean square) for inputs along A's directions, weighted by its singular values
                 (x = V_A S_A z, z normal): ‖ΔW_B ΔW_Aᵀ‖_F / ‖ΔW_A ΔW_Aᵀ‖_F. 0: B does nothing there; 1: B's output is
                 as large as A's.
    gain         the part of it along A's effect: ⟨ΔW_B ΔW_Aᵀ, ΔW_A ΔW_Aᵀ⟩ / ‖ΔW_A ΔW_Aᵀ‖². +1: the effect is doubled,
                 -1: cancelled.
    on_inputs    ‖ΔW_B V_A‖_F / ‖ΔW_B‖_F: the share of B that acts on A's inputs. 0 to 1.
    on_outputs   ‖U_Aᵀ ΔW_B‖_F / ‖ΔW_B‖_F: the share of B that writes to A's outputs. 0 to 1.

    If the adapters are weighted by w_A and w_B, change and gain scale by w_B / w_A.
    """

    change: float
    gain: float
    on_inputs: float
    on_outputs: float


@dataclass(frozen=True)
class Pair:
    """One module that both adapters change.

    `a_by_b`: how B changes A's effect. Angles in degrees, smallest first; None if a ΔW is 0.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    angles_in: list[float]
    angles_out: list[float]
    phi_in: float | None
    phi_out: float | None
    a_by_b: Interference | None
    b_by_a: Interference | None
    note: str = ""


@dataclass(frozen=True)
class Similarity:
    """φ(A, B, i, j) of one module, rows i and columns j from 1.

    `chance`: the value for random subspaces at full rank.
    """

    module: str
    of: Of
    grid: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    `only`: modules of one adapter alone; `names`, `ranks` and other pairs are in the order (A, B).
    """

    names: tuple[str, str]
    pairs: list[Pair]
    only: tuple[list[str], list[str]]
    cosine: float | None
    changes: tuple[float | None, float | None]  # interference over all modules: of A's effect by B, of B's by A
    similarities: list[Similarity]
    amplifications: tuple[list[Amplification], list[Amplification]]
    bases: list[str] = field(default_factory=list)  # how their bases differ, as far as known

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dict."""
        values = asdict(self)
        for side, rows in zip(values["amplifications"], self.amplifications, strict=True):
            for fields, row in zip(side, rows, strict=True):
                fields["factor"] = row.factor
        return values


def compare(
    a: Adapter,
    b: Adapter,
    names: tuple[str, str] = ("A", "B"),
    *,
    modules: Sequence[str] = (),
    of: Of = "A",
    base: Path | None = None,
    on_module: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare two adapters of one base.

    modules: names or name endings of the modules for which φ is computed for all i, j and, with `base`, ΔW is compared
        with W. Default: the modules with the largest updates.
    of: the singular directions for φ: "A" the right ones of the factor A, as in the paper's figures, "B" the left ones
        of B, "right" and "left" those of ΔW itself.
    base: the base's checkpoint folder.
    on_module(name, done, total): called before each shared module.

    AdapterError if the adapters have different bases and no module in common, or a module with different shapes.
    TargetError if a name in `modules` matches no shared module.
    """
    first, second = separate(a.updates), separate(b.updates)
    shared = [module for module in first if module in second]
    bases = base_differences(a, b)
    if bases and not shared:
        raise AdapterError(_nothing_shared(names, first, second))
    only = [m for m in first if m not in second], [m for m in second if m not in first]
    pairs, sums = [], _Sums()
    for i, module in enumerate(shared):
        if on_module:
            on_module(module, i, len(shared))
        pairs.append(_pair(module, first[module], second[module], names, sums))
    sums.alone([first[m] for m in only[0]], [second[m] for m in only[1]])
    chosen = _chosen(pairs, modules)
    similarities = [
        _similarity(pair.name, first[pair.name], second[pair.name], of) for pair in chosen if all(pair.ranks)
    ]
    # An expert's matrix has no name in every checkpoint: weights of experts are compared with each other only.
    alone = [pair.name for pair in chosen if pair.name in a.updates and pair.name in b.updates]
    against = ([], []) if base is None else _against(base, alone, first, second)
    return Comparison(names, pairs, only, sums.cosine, sums.changes, similarities, against, bases)


def _nothing_shared(names: tuple[str, str], first: Mapping[str, Update], second: Mapping[str, Update]) -> str:
    lines = [
        f"{name} changes {listing(updates, 3) or 'no module'}"
        for name, updates in zip(names, (first, second), strict=True)
    ]
    problem = "the adapters have different bases and no module in common, so they cannot be compared"
    return f"{problem}\n  " + "\n  ".join(lines)


def similarity(U: Tensor, V: Tensor) -> Tensor:
    """φ(i, j) for all i, j, as a matrix [columns of U, columns of V]. U and V have orthonormal columns."""
    energy = (U.T @ V).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, U.shape[1] + 1), torch.arange(1, V.shape[1] + 1)
    return energy / torch.minimum(i[:, None], j[None, :])


def principal_angles(U: Tensor, V: Tensor) -> list[float]:
    """Principal angles between two subspaces in degrees, smallest first (Björck and Golub 1973).

    U and V have orthonormal columns.
    """
    if not U.shape[1] or not V.shape[1]:
        return []
    return torch.linalg.svdvals(U.T @ V).clamp(0, 1).acos().rad2deg().tolist()


def interference(a: Spectrum, b: Spectrum) -> Interference | None:
    """How B changes A's effect; None if A's update is zero."""
    return _interfere(a, b)[0] if a.norm > 0 else None


def _interfere(a: Spectrum, b: Spectrum) -> tuple[Interference, float, float]:
    """(the interference, ‖ΔW_B ΔW_Aᵀ‖², ‖ΔW_A ΔW_Aᵀ‖²)."""
    reads, writes = a.V.T @ b.V, a.U.T @ b.U  # [r_a, r_b] both
    rank = a.strongest().S.numel()  # A's effective number of directions: without negligible singular values
    added = (a.S[:, None] * reads * b.S).square().sum()
    own = a.S.pow(4).sum()
    along = (a.S.pow(3)[:, None] * reads * b.S * writes).sum()

    def share(overlap: Tensor) -> float:
        return min(1.0, float((overlap[:rank] * b.S).norm()) / b.norm) if b.norm > 0 else 0.0

    result = Interference(math.sqrt(float(added / own)), float(along / own), share(reads), share(writes))
    return result, float(added), float(own)


class _Sums:
    """Sums over all modules: inner products of the updates, their energies, and their effects on each other."""

    def __init__(self) -> None:
        self.product, self.energy, self.added, self.own = 0.0, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]

    def alone(self, *sides: Sequence[Update]) -> None:
        """Add the modules that only A has, then those that only B has."""
        for side, updates in enumerate(sides):
            for update in updates:
                alone = decompose(matrix(update))
                self.energy[side] += alone.norm**2
                self.own[side] += float(alone.S.pow(4).sum())

    @property
    def cosine(self) -> float | None:
        return self.product / math.sqrt(self.energy[0] * self.energy[1]) if min(self.energy) > 0 else None

    @property
    def changes(self) -> tuple[float | None, float | None]:
        first, second = (
            math.sqrt(added / own) if own > 0 else None for added, own in zip(self.added, self.own, strict=True)
        )
        return first, second


def _pair(module: str, a: Update, b: Update, names: tuple[str, str], sums: _Sums) -> Pair:
    first, second = matrix(a), matrix(b)
    shape, other = size_of(first), size_of(second)
    if shape != other:
        raise AdapterError(
            f"'{module}' is {shape[0]} x {shape[1]} in {names[0]} and {other[0]} x {other[1]} in {names[1]}\n"
            "  compare adapters of the same base"
        )
    x, y = decompose(first), decompose(second)
    product = inner(first, second)
    sums.product += product
    interferences: list[Interference | None] = []
    for side, (one, two) in enumerate(((x, y), (y, x))):
        sums.energy[side] += one.norm**2
        if one.norm > 0:
            result, added, own = _interfere(one, two)
            sums.added[side] += added
            sums.own[side] += own
            interferences.append(result)
        else:
            interferences.append(None)
    s, t = x.strongest(), y.strongest()
    phi = [float(similarity(p, q)[-1, -1]) if s.rank and t.rank else None for p, q in ((s.V, t.V), (s.U, t.U))]
    cosine = max(-1.0, min(1.0, product / (x.norm * y.norm))) if x.norm > 0 and y.norm > 0 else None
    notes = [f"{n}: DoRA, its low-rank part" for n, u in zip(names, (a, b)) if u.needs_base]
    notes += [f"{n}: its {d.S.numel()} leading directions" for n, d in zip(names, (x, y)) if not d.complete]
    return Pair(
        module,
        shape,
        (s.rank, t.rank),
        (x.norm, y.norm),
        cosine,
        principal_angles(s.V, t.V),
        principal_angles(s.U, t.U),
        phi[0],
        phi[1],
        interferences[0],
        interferences[1],
        "; ".join(notes),
    )


def _chosen(pairs: Sequence[Pair], requested: Sequence[str]) -> list[Pair]:
    for name in requested:
        if not any(matches(pair.name, [name]) for pair in pairs):
            endings = {pair.name.rsplit(".", 1)[-1] for pair in pairs}
            shared = f"they share {listing([pair.name for pair in pairs], 3)}" if pairs else "they share no module"
            raise TargetError(f"no module of both adapters ends in '{name}'{did_you_mean(name, endings)}\n  {shared}")
    if requested:
        return [pair for pair in pairs if matches(pair.name, list(requested))]
    largest = sorted(pairs, key=lambda pair: pair.norms[0] * pair.norms[1], reverse=True)[:MOST_SHOWN]
    return [pair for pair in pairs if pair in largest]


def _similarity(module: str, a: Update, b: Update, of: Of) -> Similarity:
    if a.factors is None or b.factors is None:  # LoHa, LoKr and dense updates have no A and B
        of = "right" if of in ("A", "right") else "left"
    U, V = directions(a, of), directions(b, of)
    return Similarity(module, of, similarity(U, V).tolist(), max(U.shape[1], V.shape[1]) / U.shape[0])


def directions(update: Update, of: Of) -> Tensor:
    """Right or left singular vectors of ΔW, or of the factor A or B alone: columns by descending singular value."""
    low = matrix(update)
    if of in ("right", "left") or not isinstance(low, LowRank):
        delta = decompose(low).strongest()
        return delta.V if of in ("A", "right") else delta.U
    factor = low.right.T if of == "A" else low.left  # [in, r] or [out, r]
    own = decompose(LowRank(factor, torch.eye(factor.shape[1], dtype=factor.dtype))).strongest()
    return own.U


def _against(
    folder: Path, chosen: Sequence[str], a: Mapping[str, Update], b: Mapping[str, Update]
) -> tuple[list[Amplification], list[Amplification]]:
    weights = [open_weights(folder, {m: updates[m] for m in chosen}) for updates in (a, b)]
    rows: tuple[list[Amplification], list[Amplification]] = [], []
    for module in chosen:
        for side, updates, stored in zip(rows, (a, b), weights, strict=True):
            side.append(amplification(module, updates[module], stored.read(module)))
    return rows
