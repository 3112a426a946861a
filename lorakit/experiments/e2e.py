"""Methods of fine-tuning against their number of trained parameters, on E2E NLG (Hu et al. 2021, Table 3, Figure 2).

The paper compares full fine-tuning, bottleneck adapters, prefixes and LoRA on GPT-2 medium and large. Here are all of
lorakit's methods on the embedded model. A fair comparison needs a learning rate for each: every method gets the same
number of tries, at the same multiples of the rate that lorakit picks for it, with a seed and rows of their own. Losses
are compared on held-out rows, texts on the test set. A verdict compares two configurations that are named here and have
about equally many parameters, never the best of several. A method that cannot train this base is listed with the
reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .seeds import difference, show
from .suite import Budget, Finding, Result
from .verdicts import MARGIN, lower, not_higher

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Scores on E2E's test set, all references, and held-out loss after equally many steps, by method. Each method's "
    "learning rate is the best of three tries (1, 3 and 9 times the rate that lorakit picks for it in a long run) in "
    "half the steps, on other rows and with another seed. Mean over the seeds with its standard deviation; differences "
    "are paired by seed, with their 95 % interval."
)
BUDGET = Budget(seeds=3, steps=40, rows=35)
REFERENCE, LARGEST, FULL, BOTH = "LoRA q,v r 4", "LoRA all r 16", "full", "LoRA q,v r 4 + prefix"
TRIES = (1, 3, 9)
AUTO = 2.5e-3  # the rate that suits LoRA on the embedded model (tasks/text/base.py)
_QV = ["q_proj", "v_proj"]
# Name -> settings of a run. The methods of the paper's Table 3 and its appendix E, and those that train a few vectors.
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"method": "full"},
    "LoRA q,v r 1": {"targets": _QV, "rank": 1},
    REFERENCE: {"targets": _QV, "rank": 4},
    "LoRA q,v r 8": {"targets": _QV, "rank": 8},
    LARGEST: {},
    "BitFit": {"method": "bitfit"},
    "LayerNorm": {"method": "layernorm"},
    "IA3": {"method": "ia3"},
    "adapter H": {"method": "bottleneck", "bottleneck": "houlsby", "bottleneck_size": 8},
    "adapter L": {"method": "bottleneck", "bottleneck": "adapter_l", "bottleneck_size": 16},
    "prefix": {"method": "prefix"},
    "prompt": {"method": "prompt"},
    BOTH: {"targets": _QV, "rank": 4, "prompt": "prefix"},
}
# Which LoRA a method is compared with: the one whose number of parameters is nearest to its own.
EQUALS = {"adapter H": "LoRA q,v r 8", "adapter L": "LoRA q,v r 8", "prefix": "LoRA q,v r 8", "prompt": "LoRA q,v r 1"}
MEASURES = {"bleu": ("BLEU", 1), "nist": ("NIST", 2), "rouge_l": ("ROUGE-L", 1)}


def run(work: Work) -> Result:
    from .runs import scored, test_rows, train_seeds, tune_rate

    assert work.budget.rows is not None
    tests, rows = test_rows(work.budget.rows), []
    base = work.cell("the base alone", lambda: scores_of_base(tests), tests)
    for name, settings in METHODS.items():
        fit = work.cell(f"{name}, fit", partial(fitting, settings), settings)
        if fit["reason"]:
            rows.append({"name": name, "reason": fit["reason"]})
            continue
        tuned = tune_rate(
            work, f"{name}, learning rate", settings, [fit["rate"] * factor for factor in TRIES], work.budget.half
        )
        own = {**settings, "learning_rate": tuned["rate"]}
        runs = train_seeds(work, name, own)
        rows.append(
            {
                "name": name,
                "reason": "",
                "trainable": runs[0]["trainable"],
                "tuned": tuned,
                "losses": [run["loss"] for run in runs],
                "scores": scored(work, name, runs, own, tests),
                "seconds": work.seconds_of(name),
            }
        )
    return {"rows": rows, "base": base}


def fitting(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the rate that lorakit picks for a method in a long run; or the reason why it cannot train this base."""
    from ..errors import LorakitError
    from ..methods import method_names, method_of
    from ..train.config import TrainConfig
    from .runs import trainable

    name = settings.get("method", "lora")
    if name not in method_names():
        return {"rate": None, "reason": f"this version has no method {name}"}
    try:
        trainable(TrainConfig(data="-", **settings))
    except LorakitError as error:
        return {"rate": None, "reason": str(error).splitlines()[0]}
    return {"rate": method_of(name).learning_rate(AUTO, "")[0], "reason": ""}


def scores_of_base(tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Score the base without any training."""
    import torch

    from ..bases.load import EMBEDDED, load_model
    from .runs import scores_of

    return scores_of(load_model(EMBEDDED, torch.float32, torch.device("cpu")), tests)


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    other = _losses(result, REFERENCE)
    cells = [["the base", "0", "", "", "", *(_score([result["base"]], key) for key in MEASURES), ""]]
    for row in _done(result):
        rate = f"{row['tuned']['rate']:g}" + " (edge)" * row["tuned"]["edge"]
        against = "" if row["name"] == REFERENCE or other is None else difference(row["losses"], other).show()
        measures = [_score(row["scores"], key) for key in MEASURES]
        cells.append(
            [
                row["name"],
                f"{row['trainable']:,}",
                rate,
                show(row["losses"]),
                against,
                *measures,
                f"{row['seconds'] / len(row['losses']):.0f}",
            ]
        )
    heads = ["method", "parameters", "learning rate", "held-out loss", f"against {REFERENCE}"]
    heads += [label for label, _ in MEASURES.values()] + ["CPU s a run"]
    found = [Table("", heads, cells)]
    skipped = [[row["name"], row["reason"]] for row in result["rows"] if row["reason"]]
    return [*found, Table("not trained", ["method", "reason"], skipped)] if skipped else found


def findings(result: Result) -> Sequence[Finding]:
    losses = {row["name"]: row["losses"] for row in _done(result)}
    sizes = {row["name"]: f"{row['name']} ({row['trainable']:,})" for row in _done(result)}
    found = []
    for name in (REFERENCE, LARGEST):
        if {name, FULL} <= losses.keys():
            apart = difference(losses[name], losses[FULL])
            figures = f"{sizes[name]} against {sizes[FULL]}: {apart.show()}, margin {MARGIN}"
            found.append(Finding(f"{name} is as good as full fine-tuning", not_higher(apart), figures))
    for other, name in EQUALS.items():
        if {name, other} <= losses.keys():
            apart = difference(losses[name], losses[other])
            figures = f"{sizes[name]} against {sizes[other]}: {apart.show()}"
            found.append(
                Finding(f"with about equally many parameters LoRA is better than {other}", lower(apart), figures)
            )
    if {BOTH, REFERENCE} <= losses.keys():
        apart = difference(losses[BOTH], losses[REFERENCE])
        claim = "LoRA with a prefix is better than the same LoRA without (appendix E)"
        found.append(Finding(claim, lower(apart), f"{sizes[BOTH]} against {sizes[REFERENCE]}: {apart.show()}"))
    return found


def plot(result: Result, figure: Any) -> None:
    """Draw BLEU and loss over the number of trained parameters, as the paper's Figure 2."""
    for axes, (key, label) in zip(
        figure.subplots(1, 2), {"bleu": "BLEU", "loss": "held-out loss"}.items(), strict=True
    ):
        for row in _done(result):
            values = row["losses"] if key == "loss" else [score[key] for score in row["scores"]]
            axes.scatter([row["trainable"]] * len(values), values, s=10, color="#94a3b8")
            axes.scatter([row["trainable"]], [fmean(values)], s=24, color="#c2410c")
            axes.annotate(row["name"], (row["trainable"], fmean(values)), fontsize=6, rotation=20)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel(label)


def _done(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if not row["reason"]]


def _losses(result: Result, name: str) -> list[float] | None:
    return next((row["losses"] for row in _done(result) if row["name"] == name), None)


def _score(scores: Sequence[dict[str, Any]], key: str) -> str:
    values = [score[key] for score in scores if score[key] is not None]
    return show(values, MEASURES[key][1]) if values else "not measured"
