"""Taiwanese addresses in Chinese to fields: exact match, and whether other abilities survive.

The embedded model has read English alone. Its byte-level tokenizer knows no Chinese: an address of 14 characters has 38
tokens, and each character is three bytes to be copied in order. Other abilities: the loss on E2E's held-out rows, of
the base, with the adapter, and after turning the adapter off, which has to give the base's own figure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import addresses
from .suite import Budget, Finding, Result

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Addresses on roads that were not in training: shares of answers that are JSON, with each field right, and right "
    "in all; loss on E2E's held-out rows before training, with the adapter, and with the adapter off."
)
BUDGET = Budget(seeds=1, steps=200, rows=50)
TRAIN, RATE = 1600, 8e-3
LONGEST, POSITIONS = 110, 192  # tokens of an answer; of a row, with room for the longest names


def run(work: Work) -> Result:
    from .runs import train_seeds

    assert work.budget.rows is not None
    train, test = addresses.rows(addresses.places(work.file), TRAIN, work.budget.rows)
    data = _write(work.folder / "train.jsonl", train)
    settings: dict[str, Any] = {"data": str(data), "validation": str(_write(work.folder / "test.jsonl", test))}
    settings |= {"learning_rate": RATE, "max_length": POSITIONS}
    runs = train_seeds(work, "addresses", settings)
    rows = [
        work.cell(f"seed {run['seed']}", partial(_judged, work, run, settings, test), [settings, run["loss"]])
        for run in runs
    ]
    return {"rows": rows, "source": "the user's list" if work.file else "invented places"}


def _judged(work: Work, run: dict[str, Any], settings: dict[str, Any], test: list[dict[str, str]]) -> dict[str, Any]:
    from ..bases.load import EMBEDDED, load_tokenizer
    from ..data.dataset import build
    from ..data.read import read_rows
    from ..generate.generate import generate
    from ..model.activate import activate
    from ..tasks.text.perplexity import perplexity
    from .runs import e2e_files, load_result

    tokenizer, model = load_tokenizer(EMBEDDED), load_result(run, settings)
    prompts = [tokenizer(row["prompt"]).input_ids for row in test]
    texts = generate(model, tokenizer, prompts, max_new_tokens=LONGEST, batch_size=64)
    items = build(read_rows(e2e_files(work.folder)["validation"]), tokenizer).items
    losses = {}
    for name, active in (("base", None), ("adapter", "default"), ("off", None)):
        activate(model, active)
        losses[name] = perplexity(model, items, tokenizer.pad_token_id).loss
    samples = [{"address": row["prompt"].strip(), "answer": text.strip()} for row, text in zip(test, texts)][:5]
    return {"seed": run["seed"], "loss": run["loss"], **addresses.score(texts, test), "e2e": losses, "samples": samples}


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table

    names = ("json", *addresses.FIELDS, "exact")
    cells = [
        [
            f"seed {row['seed']}",
            f"{row['loss']:.4f}",
            *(f"{row[name]:.0%}" for name in names),
            *(f"{row['e2e'][name]:.4f}" for name in ("base", "adapter", "off")),
        ]
        for row in result["rows"]
    ]
    heads = ["", "held-out loss", *names, "E2E loss, base", "with the adapter", "adapter off"]
    answers = [[own["address"], own["answer"]] for own in result["rows"][0]["samples"]]
    return [Table(f"from {result['source']}", heads, cells), Table("answers", ["address", "answer"], answers)]


def findings(result: Result) -> Sequence[Finding]:
    rows = result["rows"]
    exact = [row["exact"] for row in rows]
    same = all(row["e2e"]["off"] == row["e2e"]["base"] for row in rows)
    changed = [row["e2e"]["adapter"] - row["e2e"]["base"] for row in rows]
    return [
        Finding(
            "the task is learnt",
            "agrees" if min(exact) >= 0.5 else "not shown",
            "exact match " + ", ".join(f"{value:.0%}" for value in exact),
        ),
        Finding(
            "with the adapter on, E2E's texts are as likely as before",
            "agrees" if max(changed) < 0.1 else "disagrees",
            "change of the loss " + ", ".join(f"{value:+.3f}" for value in changed),
        ),
        Finding("with the adapter off, the model is the base", "agrees" if same else "disagrees", "losses compared"),
    ]


def _write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    from ..io.atomic import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
