"""Which weight matrices to adapt at an equal number of trained parameters (Hu et al. 2021, section 7.1, Table 5).

    r · (in + out) · matrices · layers = parameters         embedded model: 4,096 a layer for attention's rows

The paper compares attention's matrices only, and leaves the MLP to future work (section 4.2); the last rows here are
the MLP's, at the nearest rank. alpha is 32 for every rank, as in the paper's experiments on GPT-2 (Table 11), and the
learning rate is the same for all: the best of a few for q and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .seeds import difference, show
from .suite import Budget, Finding, Result
from .verdicts import MARGIN, joined, lower, not_higher

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Held-out loss on E2E after training only the named matrices of every layer, all with about as many trained "
    "parameters. Mean over the seeds with its standard deviation; differences are paired by seed, with their 95 % "
    "interval. The learning rate is the best of four for q and v, on other rows and with another seed; half of it "
    "where a seed diverged."
)
BUDGET = Budget(seeds=3, steps=40)
REFERENCE, ALL_FOUR = "q, v", "q, k, v, o"
# Name -> modules, rank. "o" is Wo; gate, up and down are the MLP's three matrices (704 wide; 256 in attention).
ATTENTION: dict[str, tuple[list[str], int]] = {
    "q": (["q_proj"], 8),
    "k": (["k_proj"], 8),
    "v": (["v_proj"], 8),
    "o": (["o_proj"], 8),
    "q, k": (["q_proj", "k_proj"], 4),
    "q, v": (["q_proj", "v_proj"], 4),
    ALL_FOUR: (["q_proj", "k_proj", "v_proj", "o_proj"], 2),
}
MLP: dict[str, tuple[list[str], int]] = {
    "down": (["down_proj"], 4),
    "gate, up": (["gate_proj", "up_proj"], 2),
    "all seven": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
}


def run(work: Work) -> Result:
    from .runs import train_stable, tune_rate

    targets, rank = ATTENTION[REFERENCE]
    tuned = tune_rate(work, f"learning rate of {REFERENCE}", {"targets": targets, "rank": rank})
    rows = []
    for name, (targets, rank) in {**ATTENTION, **MLP}.items():
        own = {"targets": targets, "rank": rank, "learning_rate": tuned["rate"]}
        runs, rate = train_stable(work, name, own)
        rows.append(
            {
                "name": name,
                "rank": rank,
                "rate": rate,
                "trainable": runs[0]["trainable"],
                "losses": [run["loss"] for run in runs],
            }
        )
    return {"rows": rows, "tuned": tuned}


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table
    from .runs import show_rate

    reference = _losses(result)[REFERENCE]
    cells = [
        [
            row["name"],
            str(row["rank"]),
            f"{row['trainable']:,}",
            f"{row['rate']:g}",
            show(row["losses"]),
            "" if row["name"] == REFERENCE else difference(row["losses"], reference).show(),
        ]
        for row in result["rows"]
    ]
    title = f"learning rate {show_rate(result['tuned'])}"
    return [
        Table(
            title, ["matrices", "rank", "parameters", "learning rate", "held-out loss", f"against {REFERENCE}"], cells
        )
    ]


def findings(result: Result) -> Sequence[Finding]:
    losses = _losses(result)
    singly = {name: difference(losses[ALL_FOUR], losses[name]) for name in ("q", "k", "v", "o")}
    spread = difference(losses["q, v"], losses["q, k"])
    alone = difference(losses["v"], losses["q"])
    outside = difference(losses[ALL_FOUR], losses["down"])
    return [
        Finding(
            "at an equal budget, all four kinds of matrices at a low rank are better than any one at a higher rank",
            joined([lower(own) for own in singly.values()]),
            f"{ALL_FOUR} against " + "; ".join(f"{name} {own.show()}" for name, own in singly.items()),
        ),
        Finding(
            "q and v together are better than q and k together", lower(spread), f"q, v against q, k: {spread.show()}"
        ),
        Finding("v alone is better than q alone", lower(alone), f"v against q: {alone.show()}"),
        Finding(
            "beyond the paper, which leaves the MLP to future work: adapting attention alone loses nothing",
            not_higher(outside),
            f"{ALL_FOUR} against down, which has fewer parameters: {outside.show()}, margin {MARGIN}",
        ),
    ]


def plot(result: Result, figure: Any) -> None:
    """Draw the losses as points, one per seed."""
    axes = figure.subplots()
    names = [row["name"] for row in result["rows"]]
    for place, row in enumerate(result["rows"]):
        axes.scatter([place] * len(row["losses"]), row["losses"], s=16, color="#64748b")
        axes.scatter([place], [fmean(row["losses"])], marker="_", s=240, color="#c2410c")
    axes.set_xticks(range(len(names)), [f"{row['name']}\nr {row['rank']}" for row in result["rows"]], fontsize=8)
    axes.set_ylabel("held-out loss")


def _losses(result: Result) -> dict[str, list[float]]:
    return {row["name"]: row["losses"] for row in result["rows"]}
