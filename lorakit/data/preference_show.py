"""Print preferences as the model will see them: each row's answers with the trained tokens marked, and the facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from .preference_items import PreferenceItem, Preferences
from .show import STYLES, histogram, legend, marked, print_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show(data: Preferences, tokenizer: PreTrainedTokenizerBase, rows: int = 3, console: Console | None = None) -> None:
    """Print the first rows and the facts of `report`."""
    console = console or Console()
    colour = console.color_system is not None and not console.no_color
    console.print(legend(colour))
    for item in data.items[:rows]:
        console.print(Text(f"\n{item.where}", style="bold"), soft_wrap=True)
        for name, answer in zip(names(item), item.answers, strict=True):
            counts = f"{answer.size:,} tokens, {sum(answer.trained):,} trained"
            console.print(Text(f"{name} ({counts})", style="bold"), soft_wrap=True)
            console.print(marked(answer, tokenizer, colour), soft_wrap=not console.is_terminal)
    console.print(Text("\nlength in tokens, of each row's longest answer with its prompt", style="bold"))
    for line in histogram(data.lengths, data.max_length):
        console.print(Text(line))
    print_facts(facts(data), console)


def names(item: PreferenceItem) -> Sequence[str]:
    """Return what an item's answers are called."""
    return ("chosen", "rejected") if item.desirable is None else (("un" * (not item.desirable)) + "desirable",)


def report(data: Preferences) -> dict[str, Any]:
    """Return what `show` prints as a dict for scripts. Lengths are in tokens."""
    answers = [answer for item in data.items for answer in item.answers]
    counted = {
        "rows": len(data.items),
        "desirable": sum(item.desirable is True for item in data.items),
        "undesirable": sum(item.desirable is False for item in data.items),
    }
    return {
        "shape": data.shape,
        "template": data.style,
        **(counted if data.items[0].desirable is not None else {"rows": len(data.items)}),
        "tokens": sum(answer.size for answer in answers),
        "trained_tokens": sum(sum(answer.trained) for answer in answers),
        "chosen_longer": sum(item.answers[0].size > item.answers[-1].size for item in data.items),
        "length": {"min": min(data.lengths), "median": int(np.median(data.lengths)), "max": max(data.lengths)},
        "max_length": data.max_length,
        "max_length_reason": data.max_length_reason,
        "cut": data.cut,
        "dropped": data.dropped,
        "notes": data.notes,
    }


def facts(data: Preferences) -> list[tuple[str, str]]:
    """Return the facts of `report` as (label, text) pairs."""
    counts = report(data)
    length, share = counts["length"], counts["trained_tokens"] / counts["tokens"]
    pairs = data.items[0].desirable is None
    kinds = (
        f"{counts['chosen_longer']:,} of {counts['rows']:,} have the longer answer chosen"
        if pairs
        else f"{counts['desirable']:,} desirable, {counts['undesirable']:,} undesirable"
    )
    done = f"{data.cut:,} cut at the end, {data.dropped:,} dropped" if data.cut else f"{data.dropped:,} dropped"
    return [
        ("rows", f"{counts['rows']:,} {'pairs' if pairs else 'answers'}"),
        ("shape", data.shape),
        ("answers", kinds),
        ("template", STYLES[data.style]),
        ("tokens", f"{counts['tokens']:,}, of which {counts['trained_tokens']:,} trained ({share:.0%})"),
        ("row length", f"{length['min']:,} to {length['max']:,}, median {length['median']:,}"),
        ("max_length", f"{data.max_length:,} ({data.max_length_reason})"),
        ("longer than that", f"rows: {done}"),
        *(("note", f"{count:,} rows: {note}") for note, count in data.notes.items()),
    ]
