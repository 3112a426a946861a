"""Which rank (Hu et al. 2021, section 7.2: Table 6 on GPT-3; Tables 15 and 18 on GPT-3 and GPT-2).

alpha is 32 for every rank and the learning rate is the same (the best of four at rank 8), as in the paper ("we simply set alpha to the first r we
try and do not tune it"). The seeds' noise stands beside each difference: a rank is better than another only if the
difference is above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .seeds import difference, show
from .suite import Budget, Finding, Result, verdict

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Held-out loss on E2E and BLEU on its test set by rank, for adapters on q and v (the paper's choice) and on all "
    "linear layers (lorakit's default). Mean over the seeds with its standard deviation; differences are paired by "
    "seed, with their 95 % interval. The learning rate is the best of four at rank 8, with another seed."
)
BUDGET = Budget(seeds=3, steps=60, rows=35)
REFERENCE = 8
# Modules, ranks.
TARGETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "q, v": (["q_proj", "v_proj"], (1, 2, 4, 8, 64)),
    "all linear": ("all-linear", (1, 8, 64)),
}


def run(work: Work) -> Result:
    from .runs import test_rows, texts_scores, train_seeds, tune_rate

    assert work.budget.rows is not None
    tests, rows = test_rows(work.budget.rows), []
    for name, (targets, ranks) in TARGETS.items():
        tuned = tune_rate(work, f"learning rate of {name}", {"targets": targets, "rank": REFERENCE})
        for rank in ranks:
            settings = {"targets": targets, "rank": rank, "learning_rate": tuned["rate"]}
            part = f"{name}, rank {rank}"
            runs = train_seeds(work, part, settings)
            scores = [
                work.cell(f"{part}, texts of seed {run['seed']}", lambda run=run: texts_scores(run, settings, tests))
                for run in runs
            ]
            rows.append(
                {
                    "targets": name,
                    "rank": rank,
                    "rate": tuned["rate"],
                    "trainable": runs[0]["trainable"],
                    "losses": [run["loss"] for run in runs],
                    "bleus": [score["bleu"] for score in scores],
                }
            )
    return {"rows": rows}


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    cells = []
    for row in result["rows"]:
        own, other = row["rank"], _losses(result, row["targets"])[REFERENCE]
        cells.append(
            [
                row["targets"],
                str(own),
                f"{row['trainable']:,}",
                show(row["losses"]),
                "" if own == REFERENCE else difference(row["losses"], other).show(),
                show(row["bleus"], 1),
            ]
        )
    heads = ["matrices", "rank", "parameters", "held-out loss", f"against rank {REFERENCE}", "BLEU"]
    return [Table("", heads, cells)]


def findings(result: Result) -> Sequence[Finding]:
    found = []
    for name in TARGETS:
        losses = _losses(result, name)
        least, most = difference(losses[1], losses[REFERENCE]), difference(losses[64], losses[REFERENCE])
        found += [
            Finding(
                f"a rank of 1 is enough ({name})",
                "disagrees" if least.mean > 0 and least.above_noise else "agrees",
                f"rank 1 against {REFERENCE}: {least.show()}",
            ),
            Finding(
                f"a rank of 64 is not better than one of {REFERENCE} ({name})",
                "disagrees" if most.mean < 0 and most.above_noise else "agrees",
                f"rank 64 against {REFERENCE}: {most.show()}",
            ),
        ]
    best = min(fmean(values) for values in _losses(result, "all linear").values())
    spread = difference(_losses(result, "all linear")[1], _losses(result, "q, v")[64])
    found.append(
        Finding(
            "what is adapted matters more than the rank (section 7.1 against 7.2)",
            verdict(spread.mean < 0, spread),
            f"all linear at rank 1 against q, v at rank 64: {spread.show()}; the best of all: {best:.4f}",
        )
    )
    return found


def plot(result: Result, figure: Any) -> None:
    """Draw loss and BLEU over the rank, a point per seed and a line through the means."""
    for axes, (key, label) in zip(
        figure.subplots(1, 2), {"losses": "held-out loss", "bleus": "BLEU"}.items(), strict=True
    ):
        for name, colour in zip(TARGETS, ("#64748b", "#c2410c"), strict=True):
            own = [row for row in result["rows"] if row["targets"] == name]
            axes.plot([r["rank"] for r in own], [fmean(r[key]) for r in own], color=colour, label=name)
            for row in own:
                axes.scatter([row["rank"]] * len(row[key]), row[key], s=12, color=colour)
        axes.set_xscale("log", base=2)
        ranks = sorted({row["rank"] for row in result["rows"]})
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank")
        axes.set_ylabel(label)
    figure.axes[0].legend(frameon=False)


def _losses(result: Result, targets: str) -> dict[int, list[float]]:
    return {row["rank"]: row["losses"] for row in result["rows"] if row["targets"] == targets}
