"""How much the subspaces of adapters of different ranks and seeds have in common (Hu et al. 2021, Figures 3 and 4).

    φ(A, B, i, j) = ‖U_A^iᵀ U_B^j‖_F² / min(i, j)       U^i: the first i singular directions; 0 orthogonal, 1 contained

Figure 3 compares ranks 8 and 64, Figure 4 two seeds of rank 64, beside two random Gaussian matrices. As in the paper
the directions are those of A. Of a random start A keeps some part, so those of ΔW = s · B A, which starts at zero, are
shown too. The adapters of Figure 3 have different seeds: equal ones would start from equal rows of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter.adapter import Adapter
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Similarity φ(i, j) of the first i and j singular directions of two adapters on q and v, trained on E2E: ranks 8 "
    "and 64, two seeds of rank 64, and two random Gaussian matrices. Means over the layers; 0: orthogonal, 1: "
    "contained."
)
BUDGET = Budget(steps=100)
SMALL, LARGE, RATE = 8, 64, 8e-3
KINDS = ("q_proj", "v_proj")
PAIRS = ("ranks 8 and 64", "two seeds of rank 64", "random")
OF = {"A": "A", "ΔW": "right"}
SHOWN = ((1, 1), (1, 8), (8, 8), (8, 64))


def run(work: Work) -> Result:
    from ..adapter.adapter import Adapter
    from .runs import train_seeds

    own = {"targets": list(KINDS), "learning_rate": RATE}
    large = train_seeds(work, f"rank {LARGE}", {**own, "rank": LARGE}, seeds=2)
    small = train_seeds(work, f"rank {SMALL}", {**own, "rank": SMALL}, seeds=1)
    first, second, other = (Adapter.load(runs["folder"]) for runs in (*large, *small))
    trained = [own, work.budget.steps, *(run["loss"] for runs in (large, small) for run in runs)]
    grids = work.cell("similarities", lambda: similarities(other, first, second), trained)
    return {"grids": grids}


def similarities(small: Adapter, first: Adapter, second: Adapter) -> dict[str, dict[str, list[list[float]]]]:
    """Return φ's grid for each pair and kind of module, by what the directions are of; means over the layers.

    `first` has the seed of `small`, so the ranks are compared with `second`.
    """
    import torch

    from ..analysis.compare import directions, similarity

    grids: dict[str, dict[str, list[list[float]]]] = {}
    for of, name in OF.items():
        for kind in KINDS:
            modules = [module for module in first.updates if module.endswith(kind)]
            every: dict[str, list[Tensor]] = {pair: [] for pair in PAIRS}
            for number, module in enumerate(modules):
                a, b, c = (directions(x.updates[module], name) for x in (small, first, second))  # type: ignore[arg-type]
                every[PAIRS[0]].append(similarity(a, c))
                every[PAIRS[1]].append(similarity(b, c))
                every[PAIRS[2]].append(similarity(*random_directions(b.shape[0], b.shape[1], number)))
            for pair, values in every.items():
                smallest = [min(v.shape[axis] for v in values) for axis in (0, 1)]  # a rank may be below its most
                mean = torch.stack([v[: smallest[0], : smallest[1]] for v in values]).mean(0)
                rounded = [[round(float(x), 4) for x in row] for row in mean]
                grids.setdefault(f"{pair}, {of}", {})[kind] = rounded
    return grids


def random_directions(width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the singular directions [width, rank] of two random Gaussian matrices."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(width, rank, generator=generator, dtype=torch.float64) for _ in range(2)]
    first, second = (torch.linalg.svd(matrix, full_matrices=False).U for matrix in draw)
    return first, second


def phi(grid: Sequence[Sequence[float]], i: int, j: int) -> float:
    """Return φ(i, j), or that of the largest i and j there are."""
    return grid[min(i, len(grid)) - 1][min(j, len(grid[0])) - 1]


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    cells = [
        [f"{pair}, of {of}", kind, *(f"{phi(result['grids'][f'{pair}, {of}'][kind], i, j):.3f}" for i, j in SHOWN)]
        for pair in PAIRS
        for of in OF
        if pair != "random" or of == "A"
        for kind in KINDS
    ]
    return [Table("", ["adapters", "modules", *(f"φ({i}, {j})" for i, j in SHOWN)], cells)]


def findings(result: Result) -> Sequence[Finding]:
    grids = result["grids"]

    def mean(pair: str, of: str, i: int, j: int) -> float:
        return fmean(phi(grids[f"{pair}, {of}"][kind], i, j) for kind in KINDS)

    ranks, seeds, random = PAIRS
    top, chance = mean(ranks, "A", 1, 1), mean(random, "A", 1, 1)
    within, rest = mean(ranks, "A", 1, SMALL), mean(ranks, "A", SMALL, SMALL)
    shared, seeds_chance = mean(seeds, "A", 8, 8), mean(random, "A", 8, 8)
    by_kind = [phi(grids[f"{seeds}, A"][kind], 8, 8) for kind in KINDS]
    return [
        Finding(
            "the first direction of rank 8 is also rank 64's: similarity above 0.5 (figure 3)",
            "agrees" if top > 0.5 else "disagrees",
            f"φ(1, 1) {top:.2f}, random {chance:.3f}; within rank {LARGE}'s first 8, φ(1, 8) {within:.2f}, random "
            f"{mean(random, 'A', 1, 8):.3f}",
        ),
        Finding(
            "the further directions overlap less than the first",
            "agrees" if rest < within else "disagrees",
            f"φ(8, 8) {rest:.2f} against φ(1, 8) {within:.2f}; random {seeds_chance:.3f} for both",
        ),
        Finding(
            "two seeds have more directions in common than random matrices have (figure 4)",
            "agrees" if shared > 2 * seeds_chance else "not shown",
            f"φ(8, 8) {shared:.2f} of A, {mean(seeds, 'ΔW', 8, 8):.2f} of ΔW; random {seeds_chance:.3f}",
        ),
        Finding(
            "ΔWq has more directions in common than ΔWv: a higher intrinsic rank",
            "agrees" if by_kind[0] > by_kind[1] else "disagrees",
            f"φ(8, 8) of q {by_kind[0]:.2f}, of v {by_kind[1]:.2f} (one pair of seeds, no noise known)",
        ),
    ]


def plot(result: Result, figure: Any) -> None:
    """Draw φ of A over i and j: a row for each kind of module, a column for each pair."""
    axes = figure.subplots(len(KINDS), len(PAIRS))
    for row, kind in enumerate(KINDS):
        for column, pair in enumerate(PAIRS):
            grid = result["grids"][f"{pair}, A"][kind]
            ax = axes[row][column]
            extent = (0.5, len(grid[0]) + 0.5, len(grid) + 0.5, 0.5)
            image = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
            ax.set_title(f"{kind}, {pair}", fontsize=8)
            ax.set_xlabel("j", fontsize=7)
            ax.set_ylabel("i", fontsize=7)
    figure.colorbar(image, ax=axes, label="φ(i, j)")
