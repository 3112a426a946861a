"""Measures: their names and how they are shown; a task's own (loss, accuracy, ...) of each adapter on the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.tables import Table
from ..model.activate import activate
from ..tasks.task import Base, Item, Task

MODEL = "model"
# A measure's key -> its name, digits after the point.
MEASURES = {
    "loss": ("loss", 4),
    "perplexity": ("perplexity", 2),
    "accuracy": ("accuracy", 4),
    "macro_f1": ("macro f1", 4),
    "wer": ("word error rate", 4),
    "reward_accuracy": ("reward accuracy", 4),
    "reward_margin": ("reward margin", 4),
    "reward_chosen": ("reward chosen", 4),
    "reward_rejected": ("reward rejected", 4),
    "likelihood_accuracy": ("chosen likelier", 4),  # per token, without a reference
    "kl": ("KL", 4),
    "matthews": ("Matthews", 4),
    "pearson": ("Pearson", 4),
    "spearman": ("Spearman", 4),
    "recall_at_1": ("recall@1", 4),
    "recall_at_5": ("recall@5", 4),
    "recall_at_10": ("recall@10", 4),
    "entity_f1": ("entity f1", 4),
    "entity_precision": ("precision", 4),
    "entity_recall": ("recall", 4),
    "answer_f1": ("answer f1", 1),
    "bleu": ("BLEU", 1),
    "chrf": ("chrF", 1),
    "rouge_1": ("ROUGE-1", 1),
    "rouge_2": ("ROUGE-2", 1),
    "rouge_l": ("ROUGE-L", 1),
    "exact_match": ("exact match", 1),
    "cut": ("cut off", 0),  # answers that reached --max-new-tokens before their end
}


def figures(
    task: Task, base: Base, items: Sequence[Item], adapters: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """Return the measures of each adapter, or of the model if there is none: a base alone has no trained head."""
    results = []
    for name in adapters:
        activate(base.model, name)
        results.append({"adapter": name, **task.evaluate(base, items, batch_size), "rows": row_count(items)})
    return results or [{"adapter": None, **task.evaluate(base, items, batch_size), "rows": row_count(items)}]


def row_count(items: Sequence[Item]) -> int:
    """Return how many rows items are of: one may be several items, such as the windows of a long text."""
    return len({item.where for item in items})


def first_rows(items: Sequence[Item], most: int | None) -> list[Item]:
    """Return all items of the first `most` rows; None: of all rows."""
    kept = set(list(dict.fromkeys(item.where for item in items))[:most])
    return [item for item in items if item.where in kept]


def table(results: Sequence[Mapping[str, Any]], title: str, unnamed: str = MODEL) -> Table:
    """Return a line for each adapter and a column for each measure. unnamed: the label where `adapter` is None."""
    keys = measured(results)
    rows = [[row["adapter"] or unnamed, *(show(key, row.get(key)) for key in keys)] for row in results]
    return Table(title, ["", *(MEASURES[key][0] for key in keys)], rows)


def measured(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the measures that at least one result has."""
    return [key for key in MEASURES if any(show(key, row.get(key)) for row in results)]


def show(key: str, value: Any) -> str:
    """Format a measure; "" for what is not a number, as in an untrusted file."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return f"{value:,.{MEASURES[key][1]}f}" if is_number else ""
