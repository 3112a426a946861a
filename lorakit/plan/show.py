"""Print a plan on the terminal: methods side by side, as figures and as bars, and the batches that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from ..methods import method_of
from .estimate import PARTS, Estimate
from .units import show_bytes

# Each part's letter and colour in the bars.
_MARKS = {
    "weights": ("W", "blue"),
    "adapter": ("A", "cyan"),
    "optimizer": ("O", "magenta"),
    "best": ("B", "bright_magenta"),
    "gradients": ("G", "yellow"),
    "activations": ("a", "green"),
    "loss": ("l", "red"),
    "working": ("w", "bright_green"),
    "holes": ("h", "bright_black"),
    "overhead": ("o", "white"),
}
WIDTH = 64  # of the bars, where there is room
_LABEL, _SIZE = 15, 8  # characters before and after a bar


def numbers(
    estimates: Sequence[Estimate],
    memory: int | None,
    rows: Mapping[str, int],
    lengths: Mapping[str, int],
    most_rows: int,
    positions: int | None,
) -> Table:
    """Build a table with one column per estimate.

    `memory`: bytes available, None if unknown; `rows`, `lengths`: method -> the largest that fit; `most_rows`,
    `positions`: where the search for these ended.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for estimate in estimates:
        table.add_column(_title(estimate), justify="right")

    def line(name: str, values: Sequence[str], style: str = "") -> None:
        table.add_row(Text(name), *map(Text, values), style=style)

    line("trained", [f"{e.trained:,}" for e in estimates])
    line("as a file", [show_bytes(e.trained_bytes) for e in estimates])
    for part in PARTS:
        if any(e.parts[part] for e in estimates):
            line(f"{_MARKS[part][0]} {part}", [show_bytes(e.parts[part]) for e in estimates])
    line("at most", [show_bytes(e.total) for e in estimates], "bold")
    line("while in", [f"the {e.peak}" for e in estimates])
    if memory is not None:
        line(f"fits {show_bytes(memory)}", ["yes" if e.total <= memory else "no" for e in estimates])
        line(f"most rows of {estimates[0].length}", [_most(rows[e.method], most_rows) for e in estimates])
        line(f"longest, {estimates[0].rows} at once", [_most(lengths[e.method], positions) for e in estimates])
    return table


def bars(estimates: Sequence[Estimate], memory: int | None, columns: int = 120) -> Text:
    """Draw each estimate as a bar of its parts' letters, and a mark at the available memory (bytes).

    columns: of the terminal.
    """
    width = max(8, min(WIDTH, columns - _LABEL - _SIZE - 1))
    most = max(e.total for e in estimates)
    memory = None if memory is None or memory > most else memory  # no mark beyond the longest bar
    text = Text()
    for estimate in estimates:
        text.append(f"{_title(estimate):<14} ")
        done, drawn = 0, 0
        for part, size in estimate.parts.items():
            done += size
            upto = round(width * done / most)
            letter, colour = _MARKS[part]
            text.append(letter * (upto - drawn), style=colour)
            drawn = upto
        text.append(" " * (width - drawn) + f" {show_bytes(estimate.total)}\n")
    if memory is not None:
        at = min(width - 1, round(width * memory / most))
        text.append(f"{'memory':<14} " + " " * at + "|" + " " * (width - at - 1) + f" {show_bytes(memory)}\n")
    return text


def grid(fitting: Mapping[int, int], most: int) -> Table:
    """Build a table of the largest batch that fits, by length. `fitting`: length -> rows; `most`: the search's end."""
    table = Table(box=None, pad_edge=False)
    table.add_column("length")
    for length in fitting:
        table.add_column(f"{length:,}", justify="right")
    table.add_row("most rows at once", *(_most(rows, most) for rows in fitting.values()))
    return table


def _title(estimate: Estimate) -> str:
    """Return the method's title, and how the base is stored."""
    if estimate.storage is None:
        return method_of(estimate.method).title
    return f"{method_of(estimate.method.removeprefix(f'{estimate.storage} ')).title}, {estimate.storage}"


def _most(fits: int, limit: int | None) -> str:
    """Format a number, with a "+" if the search ended there."""
    return f"{fits:,}{'+' * (limit is not None and fits >= limit)}" if fits else "none"
