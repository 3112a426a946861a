"""Few training rows (Hu et al. 2021, appendix F.3, Table 16): 100, 500, 1,000 and all of E2E's.

The paper trains GPT-3 on parts of MNLI and finds LoRA ahead of full fine-tuning, and prefixes far behind, when rows are
few. Here every run has equally many steps, so that fewer rows mean more passes over them, and the smaller parts are the
first rows of the larger ones. The learning rate of each method is the best of three tries on 1,000 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .e2e import EQUALS, FULL, METHODS, TRIES, fitting
from .seeds import difference, show
from .suite import Budget, Finding, Result
from .verdicts import MARGIN, lower, not_higher

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Held-out loss on E2E by method and number of training rows, after equally many steps of 4 rows. The learning rate "
    "is the best of three tries on 1,000 rows, in half the steps, on other rows and with another seed. Mean over the "
    "seeds with its standard deviation."
)
BUDGET = Budget(seeds=2, steps=40)
EVERY = 3552  # all rows but the held-out ones
SIZES = (100, 500, 1000, EVERY)
LORA = EQUALS["prefix"]  # with about as many parameters as the prefix
COMPARED = (FULL, LORA, "prefix")


def run(work: Work) -> Result:
    from .runs import e2e_files, train_seeds, tune_rate

    rows = []
    for name in COMPARED:
        settings = METHODS[name]
        fit = work.cell(f"{name}, fit", partial(fitting, settings), settings)
        if fit["reason"]:
            continue
        tuned = tune_rate(
            work, f"{name}, learning rate", settings, [fit["rate"] * factor for factor in TRIES], work.budget.half
        )
        for size in SIZES:
            own = {**settings, **e2e_files(work.folder, size), "learning_rate": tuned["rate"]}
            runs = train_seeds(work, f"{name}, {size} rows", own)
            rows.append({"name": name, "rows": size, "tuned": tuned, "losses": [run["loss"] for run in runs]})
    return {"rows": rows}


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    cells = [[name, *(show(_losses(result, name)[size]) for size in SIZES)] for name in names]
    return [Table("", ["method", *(f"{size:,} rows" for size in SIZES)], cells)]


def findings(result: Result) -> Sequence[Finding]:
    found, lora = [], _losses(result, LORA)
    for size in (SIZES[0], SIZES[-1]):
        apart = difference(lora[size], _losses(result, FULL)[size])
        claim = f"with {size:,} rows LoRA is as good as full fine-tuning or better"
        figures = f"{LORA} against full: {apart.show()}, margin {MARGIN}"
        found.append(Finding(claim, not_higher(apart), figures))
    if prefix := _losses(result, "prefix"):
        apart = difference(lora[SIZES[0]], prefix[SIZES[0]])
        claim, figures = f"with {SIZES[0]} rows LoRA is better than a prefix", f"{LORA} against prefix: "
        found.append(Finding(claim, lower(apart), figures + apart.show()))
    return found


def plot(result: Result, figure: Any) -> None:
    """Draw the loss over the number of rows, a line for each method."""
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        losses = _losses(result, name)
        axes.plot(list(losses), [fmean(values) for values in losses.values()], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("training rows")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False)


def _losses(result: Result, name: str) -> dict[int, list[float]]:
    return {row["rows"]: row["losses"] for row in result["rows"] if row["name"] == name}
