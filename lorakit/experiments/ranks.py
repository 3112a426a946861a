"""Which rank (Hu et al. 2021, section 7.2: Table 6 on GPT-3; Tables 15 and 18 on GPT-3 and GPT-2).

alpha is 32 for every rank and the learning rate is the same (the best of four at rank 8), as in the paper ("we simply
set alpha to the first r we try and do not tune it"). The seeds' noise stands beside each difference: a rank is better
than another only if the difference is above it, and as good only if it is within a margin (`verdicts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .seeds import difference, show
from .suite import Budget, Finding, Result
from .verdicts import MARGIN, alike, joined, not_higher

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Held-out loss on E2E and BLEU on its test set by rank, for adapters on q and v (the paper's choice). Mean over "
    "the seeds with its standard deviation; differences are paired by seed, with their 95 % interval. The learning "
    "rate is the best of four at rank 8, on other rows and with another seed; half of it where a seed diverged."
)
BUDGET = Budget(seeds=3, steps=40, rows=35)
RANKS, REFERENCE, LARGEST = (1, 2, 4, 8, 64), 8, 64
TARGETS = ["q_proj", "v_proj"]


def run(work: Work) -> Result:
    from .runs import scored, test_rows, train_stable, tune_rate

    assert work.budget.rows is not None
    tests, rows = test_rows(work.budget.rows), []
    tuned = tune_rate(work, f"learning rate of rank {REFERENCE}", {"targets": TARGETS, "rank": REFERENCE})
    for rank in RANKS:
        settings = {"targets": TARGETS, "rank": rank, "learning_rate": tuned["rate"]}
        runs, rate = train_stable(work, f"rank {rank}", settings)
        scores = scored(work, f"rank {rank}", runs, settings, tests)
        rows.append(
            {
                "rank": rank,
                "rate": rate,
                "trainable": runs[0]["trainable"],
                "losses": [run["loss"] for run in runs],
                "bleus": [score["bleu"] for score in scores],
            }
        )
    return {"rows": rows, "tuned": tuned}


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table
    from .runs import show_rate

    cells = []
    for row in result["rows"]:
        other = _losses(result)[REFERENCE]
        cells.append(
            [
                str(row["rank"]),
                f"{row['trainable']:,}",
                f"{row['rate']:g}",
                show(row["losses"]),
                "" if row["rank"] == REFERENCE else difference(row["losses"], other).show(),
                show(row["bleus"], 1),
            ]
        )
    title = f"learning rate {show_rate(result['tuned'])}"
    return [
        Table(
            title, ["rank", "parameters", "learning rate", "held-out loss", f"against rank {REFERENCE}", "BLEU"], cells
        )
    ]


def findings(result: Result) -> Sequence[Finding]:
    losses = _losses(result)
    apart = {rank: difference(own, losses[REFERENCE]) for rank, own in losses.items() if rank != REFERENCE}
    reference_ahead = difference(losses[REFERENCE], losses[LARGEST])
    return [
        Finding(
            "a rank of 1 is enough",
            not_higher(apart[1]),
            f"rank 1 against {REFERENCE}: {apart[1].show()}, margin {MARGIN}",
        ),
        Finding(
            f"a rank of {LARGEST} is not better than one of {REFERENCE}",
            not_higher(reference_ahead),
            f"rank {LARGEST} against {REFERENCE}: {apart[LARGEST].show()}, margin {MARGIN}",
        ),
        Finding(
            "small and large ranks perform alike",
            joined([alike(own) for own in apart.values()]),
            f"against rank {REFERENCE}, margin ±{MARGIN}: "
            + "; ".join(f"rank {rank} {alike(own)}" for rank, own in apart.items()),
        ),
    ]


def plot(result: Result, figure: Any) -> None:
    """Draw loss and BLEU over the rank, a point per seed and a line through the means."""
    for axes, (key, label) in zip(
        figure.subplots(1, 2), {"losses": "held-out loss", "bleus": "BLEU"}.items(), strict=True
    ):
        rows = result["rows"]
        axes.plot([row["rank"] for row in rows], [fmean(row[key]) for row in rows], color="#c2410c")
        for row in rows:
            axes.scatter([row["rank"]] * len(row[key]), row[key], s=12, color="#64748b")
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["rank"] for row in rows], [str(row["rank"]) for row in rows])
        axes.set_xlabel("rank")
        axes.set_ylabel(label)


def _losses(result: Result) -> dict[int, list[float]]:
    return {row["rank"]: row["losses"] for row in result["rows"]}
