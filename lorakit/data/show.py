"""Print the data as the model will see it: rows with trained tokens marked, lengths, repeats, rows over the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.data.dataset import Dataset, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED = "bold green"
CONTEXT = "dim"
BINS = 10
BAR = 40

STYLES = {
    "none": "none (texts unchanged)",
    "chat": "the tokenizer's chat template",
    "plain": "lorakit's plain template",
}


def show(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int = 3, console: Console | None = None) -> None:
    """Print the first rows and the facts of `report`."""
    console = console or Console()
    colour = console.color_system is not None and not console.no_color
    console.print(legend(colour))
    for item in dataset.items[:rows]:
        count = f"{len(item.ids):,} tokens, {sum(item.trained):,} trained"
        console.print(Text(f"\n{item.row.where} ({count})", style="bold"), soft_wrap=True)
        console.print(marked(item, tokenizer, colour), soft_wrap=not console.is_terminal)
    console.print(Text("\nlength in tokens", style="bold"))
    for line in histogram(dataset.lengths, dataset.max_length):
        console.print(Text(line))
    print_facts(facts(dataset), console)


def print_facts(facts: Sequence[tuple[str, str]], console: Console) -> None:
    """Print facts, (label, text) each."""
    console.print(Text("\nfacts", style="bold"))
    for name, value in facts:
        if console.is_terminal:  # wrapped below its own text
            fact = Table.grid(padding=0)
            fact.add_column(width=18)
            fact.add_row(Text(name), Text(value))
            console.print(fact)
        else:
            console.print(Text(f"{name:<18}{value}"), soft_wrap=True)


def report(dataset: Dataset) -> dict[str, Any]:
    """Return what `show` prints as a dict for scripts. Lengths are in tokens."""
    lengths = dataset.lengths
    return {
        "shape": dataset.shape,
        "template": dataset.style,
        "train_on": dataset.train_on,
        "rows": len(lengths),
        "items": len(dataset.items),
        "tokens": sum(len(item.ids) for item in dataset.items),
        "trained_tokens": sum(sum(item.trained) for item in dataset.items),
        "length": {
            "min": min(lengths),
            "median": int(np.median(lengths)),
            "mean": round(float(np.mean(lengths)), 1),
            "max": max(lengths),
        },
        "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in bins(lengths)],
        "max_length": dataset.max_length,
        "max_length_reason": dataset.max_length_reason,
        "on_long": dataset.on_long,
        "cut": dataset.cut,
        "dropped": dataset.dropped,
        "split": dataset.split,
        "duplicates": dataset.duplicates,
        "same_prompt": dataset.same_prompt,
        "notes": dataset.notes,
    }


def facts(dataset: Dataset) -> list[tuple[str, str]]:
    """Return the facts of `report` as (label, text) pairs."""
    counts = report(dataset)
    length = counts["length"]
    share = counts["trained_tokens"] / counts["tokens"]
    over_limit = {
        "drop": ("dropped", dataset.dropped),
        "cut": ("cut at the end", dataset.cut),
        "split": ("split into chunks", dataset.split),
    }
    action, count = over_limit[dataset.on_long]
    rows = [
        ("rows", f"{counts['rows']:,}" + (f", as {counts['items']:,} chunks" if dataset.split else "")),
        ("shape", dataset.shape),
        ("template", STYLES[dataset.style]),
        ("tokens", f"{counts['tokens']:,}, of which {counts['trained_tokens']:,} trained ({share:.0%})"),
        ("row length", f"{length['min']:,} to {length['max']:,}, median {length['median']:,}"),
        ("max_length", f"{dataset.max_length:,} ({dataset.max_length_reason})"),
        ("longer than that", f"{count:,} of {counts['rows']:,} rows, {action}"),
    ]
    if dataset.on_long == "cut" and dataset.dropped:
        rows.append(("", f"{dataset.dropped:,} more dropped: their prompt alone exceeds the limit"))
    rows.append(("exact duplicates", f"{dataset.duplicates:,} rows repeat an earlier one"))
    rows.append(("same prompt", f"{dataset.same_prompt:,} rows share a prompt with another completion"))
    rows += [("note", f"{count:,} rows: {note}") for note, count in dataset.notes.items()]
    return rows


def marked(item: Item, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """Return the row's text with trained spans coloured, or between ⟦ and ⟧ without colour."""
    text = Text()
    start, before = 0, ""
    while start < len(item.ids):
        trained = item.trained[start]
        stop = next((i for i in range(start, len(item.ids)) if item.trained[i] != trained), len(item.ids))
        # Decoded from the start each time: some tokenizers drop the leading space of a span decoded on its own.
        so_far = str(tokenizer.decode(item.ids[:stop], clean_up_tokenization_spaces=False))
        span = so_far[len(before) :]
        text.append(span if colour or not trained else f"⟦{span}⟧", style=TRAINED if trained else CONTEXT)
        start, before = stop, so_far
    return text


def legend(colour: bool) -> Text:
    """Say how trained tokens are marked."""
    if not colour:
        return Text("⟦trained⟧ and context")
    return Text.assemble(("trained", TRAINED), " and ", ("context", CONTEXT))


def bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (from, to, rows) for at most ten bins of equal width, `to` inclusive."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    starts = range(low, high + 1, width)
    return [(s, min(s + width - 1, high), sum(s <= length < s + width for length in lengths)) for s in starts]


def histogram(lengths: Sequence[int], limit: int) -> list[str]:
    """Return one line per bin: its range in tokens, a bar, its rows, and a mark at the limit."""
    binned = bins(lengths)
    highest = max(count for _, _, count in binned)
    digits = len(str(max(lengths)))
    lines = []
    for low, high, count in binned:
        bar = "█" * max(round(BAR * count / highest), 1 if count else 0)
        mark = "  ← max_length" if low <= limit <= high and limit < max(lengths) else ""
        lines.append(f"{low:>{digits}}-{high:<{digits}} {bar} {count:,}{mark}")
    return lines
