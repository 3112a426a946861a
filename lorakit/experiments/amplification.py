"""How ΔW relates to W (Hu et al. 2021, section 7.3, Table 7): see `analysis/amplification.py` for the equations.

    ‖UᵀWVᵀ‖_F with U, V the first r singular directions of ΔW, of W, and of a random matrix
    ‖ΔW‖_F / ‖UᵀWVᵀ‖_F    the amplification factor

The paper shows one layer of GPT-3; here are means over the embedded model's six layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "W projected onto the first r singular directions of ΔW, of W and of a random matrix, for adapters on q and v "
    "trained on E2E; Frobenius norms, means over the layers. The amplification factor is ‖ΔW‖ over the first of these."
)
BUDGET = Budget(steps=100)
RANKS, KINDS, RATE = (4, 64), ("q_proj", "v_proj"), 8e-3


def run(work: Work) -> Result:
    from .runs import train_seeds

    rows = []
    for rank in RANKS:
        own = {"targets": list(KINDS), "learning_rate": RATE, "rank": rank}
        (trained,) = train_seeds(work, f"rank {rank}", own, seeds=1)
        rows += work.cell(f"rank {rank}, norms", partial(norms, trained["folder"], rank))
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
    # In the paper it is 16 times the random one at r 4. Less than twice shows no relation.
    small, large = ([_mean(result, kind, rank) for kind in KINDS] for rank in RANKS)
    return [
        Finding(
            "ΔW is related to W more than a random matrix is",
            "agrees" if all(own["in_delta"] > 2 * own["in_random"] for own in small) else "not shown",
            "; ".join(
                f"{kind} r {RANKS[0]}: {own['in_delta']:.2f}, random {own['in_random']:.2f}"
                for kind, own in zip(KINDS, small, strict=True)
            ),
        ),
        Finding(
            "ΔW does not repeat the first directions of W, but amplifies others",
            "agrees" if all(own["in_delta"] < 0.5 * own["in_w"] for own in small) else "disagrees",
            "; ".join(
                f"{kind} r {RANKS[0]}: {own['in_delta']:.2f} of W's {own['in_w']:.2f}"
                for kind, own in zip(KINDS, small, strict=True)
            ),
        ),
        Finding(
            "the amplification factor is large at a low rank (21.5 at r 4) and smaller at a high one (1.9 at r 64)",
            "agrees" if all(a["factor"] > b["factor"] for a, b in zip(small, large, strict=True)) else "disagrees",
            "; ".join(
                f"{kind}: {a['factor']:.1f} at r {RANKS[0]}, {b['factor']:.1f} at r {RANKS[1]}"
                for kind, a, b in zip(KINDS, small, large, strict=True)
            ),
        ),
    ]


def _mean(result: Result, kind: str, rank: int) -> dict[str, float]:
    own = [row for row in result["rows"] if row["rank"] == rank and row["module"].endswith(kind)]
    names = ("in_delta", "in_w", "in_random", "norm_w", "norm_delta", "factor")
    return {name: fmean(row[name] or 0.0 for row in own) for name in names}
