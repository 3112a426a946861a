"""How ΔW relates to W (Hu et al. 2021, section 7.3, Table 7): see `analysis/amplification.py` for the equations.

    ‖UᵀWVᵀ‖_F with U, V the first r singular directions of ΔW, of W, and of a random matrix
    ‖ΔW‖_F / ‖UᵀWVᵀ‖_F    the amplification factor

The paper shows one layer of GPT-3; here are means over the embedded model's six layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result, Verdict

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "W projected onto the first r singular directions of ΔW, of W and of a random matrix, for adapters on q and v "
    "trained on E2E; Frobenius norms, means over the layers. The amplification factor is ‖ΔW‖ over the first of these."
)
BUDGET = Budget(steps=100)
RANKS, KINDS, RATE = (4, 64), ("q_proj", "v_proj"), 8e-3
APART = 2  # times the random value, from which on ΔW counts as related to W; 16 in the paper at r 4


def run(work: Work) -> Result:
    from .runs import train_seeds

    rows = []
    for rank in RANKS:
        own = {"targets": list(KINDS), "learning_rate": RATE, "rank": rank}
        (trained,) = train_seeds(work, f"rank {rank}", own, seeds=1)
        rows += work.cell(f"rank {rank}, norms", partial(norms, trained["folder"], rank), [own, trained["loss"]])
    return {"rows": rows}


def norms(folder: str, rank: int) -> list[dict[str, Any]]:
    """Return the norms of each adapted module of the embedded model. `folder`: of the adapter."""
    import torch

    from ..adapter.adapter import Adapter
    from ..analysis.amplification import amplification
    from ..bases.load import EMBEDDED, load_model

    model = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    rows = []
    for module, update in Adapter.load(folder).updates.items():
        found = amplification(module, update, model.get_submodule(module).weight.detach())
        rows.append({**asdict(found), "rank": rank, "factor": found.factor})
    return rows


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    cells = []
    for kind in KINDS:
        for rank in RANKS:
            own = _mean(result, kind, rank)
            cells.append(
                [
                    kind,
                    str(rank),
                    *(f"{own[name]:.2f}" for name in ("in_delta", "in_w", "in_random", "norm_w", "norm_delta")),
                    f"{own['factor']:.1f}",
                ]
            )
    heads = ["module", "rank", "of ΔW", "of W", "random", "‖W‖", "‖ΔW‖", "factor"]
    return [Table("", heads, cells)]


def findings(result: Result) -> Sequence[Finding]:
    small, large = ([_mean(result, kind, rank) for kind in KINDS] for rank in RANKS)
    # A random matrix "does not repeat W" and "amplifies" at a low rank as well: without a relation nothing is shown.
    related = all(own["in_delta"] > APART * own["in_random"] for own in small)
    repeats = any(own["in_delta"] >= 0.5 * own["in_w"] for own in small)
    falls = all(a["factor"] > b["factor"] for a, b in zip(small, large, strict=True))
    shown: tuple[Verdict, Verdict] = ("disagrees" if repeats else "agrees", "agrees" if falls else "disagrees")
    return [
        Finding(
            "ΔW is related to W more than a random matrix is",
            "agrees" if related else "not shown",
            _figures(small, lambda own: f"{own['in_delta']:.2f}, random {own['in_random']:.2f}"),
        ),
        Finding(
            "ΔW does not repeat the first directions of W, but amplifies others",
            shown[0] if related else "not shown",
            _figures(
                small, lambda own: f"{own['in_delta']:.2f} of W's {own['in_w']:.2f}, random {own['in_random']:.2f}"
            ),
        ),
        Finding(
            "the amplification factor is large at a low rank (21.5 at r 4) and smaller at a high one (1.9 at r 64)",
            shown[1] if related else "not shown",
            "; ".join(
                f"{kind}: {a['factor']:.1f} at r {RANKS[0]}, {b['factor']:.1f} at r {RANKS[1]}, with random directions "
                f"{a['norm_delta'] / a['in_random']:.1f} and {b['norm_delta'] / b['in_random']:.1f}"
                for kind, a, b in zip(KINDS, small, large, strict=True)
            ),
        ),
    ]


def _figures(means: Sequence[dict[str, float]], show: Callable[[dict[str, float]], str]) -> str:
    return "; ".join(f"{kind} r {RANKS[0]}: {show(own)}" for kind, own in zip(KINDS, means, strict=True))


def _mean(result: Result, kind: str, rank: int) -> dict[str, float]:
    own = [row for row in result["rows"] if row["rank"] == rank and row["module"].endswith(kind)]
    names = ("in_delta", "in_w", "in_random", "norm_w", "norm_delta", "factor")
    return {name: fmean(row[name] or 0.0 for row in own) for name in names}
