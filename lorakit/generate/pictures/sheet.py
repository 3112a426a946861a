"""Which pictures to make, and where they stand in a grid: prompts x seeds x adapters x scales as rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ...errors import ConfigError, did_you_mean

AXES = ("adapter", "scale", "prompt", "seed")
WIDEST = 6  # a single axis with more values than this is wrapped or stands in rows


class Value(NamedTuple):
    """A value of an axis, and its label in the grid."""

    value: Any
    label: str


@dataclass(frozen=True)
class Sheet:
    """A grid to be made. `cells`: for each row and column the values by axis; None for an empty cell."""

    rows: list[str]
    columns: list[str]
    cells: list[list[Mapping[str, Any] | None]]

    @property
    def pictures(self) -> list[Mapping[str, Any]]:
        """The values of all pictures, row by row."""
        return [cell for row in self.cells for cell in row if cell is not None]


def sheet(values: Mapping[str, Sequence[Value]], axes: Sequence[str] = ()) -> Sheet:
    """Lay out pictures. `values`: for each of `AXES` at least one.

    `axes`: the first one's values are the rows, those of the others the columns; without it, prompts are the columns,
    and what else has several values the rows. Axes with several values that are not named are rows too.

    Raises ConfigError for an unknown axis, and one that is named twice.
    """
    for n, axis in enumerate(axes):
        if axis not in AXES:
            raise ConfigError(f"--grid: there is no axis '{axis}'{did_you_mean(axis, AXES)}\n  axes: {', '.join(AXES)}")
        if axis in axes[:n]:
            raise ConfigError(f"--grid names '{axis}' twice\n  expected ROWS,COLUMNS, such as scale,prompt")
    several = [axis for axis in AXES if len(values[axis]) > 1]
    if len(several) == 1 and not axes:
        return _one_axis(values, several[0])
    across = list(axes[1:]) if axes else ["prompt"] if "prompt" in several else several[-1:]
    down = [*axes[:1], *(axis for axis in several if axis not in across and axis not in axes)]
    rows, columns = _combined(values, down), _combined(values, across)
    fixed = {axis: values[axis][0].value for axis in AXES}
    return Sheet(
        [row.label for row in rows],
        [column.label for column in columns],
        [[fixed | row.value | column.value for column in columns] for row in rows],
    )


def _combined(values: Mapping[str, Sequence[Value]], axes: Sequence[str]) -> list[Value]:
    """Return every combination of the axes' values, as {axis: value}."""
    combined = product(*(values[axis] for axis in axes))
    return [Value(dict(zip(axes, (v.value for v in each))), ", ".join(v.label for v in each)) for each in combined]


def _one_axis(values: Mapping[str, Sequence[Value]], axis: str) -> Sheet:
    """One row of a few pictures, one column of many; many seeds are wrapped."""
    all_values = _combined(values, [axis])
    cells: list[Mapping[str, Any] | None] = [
        {name: values[name][0].value for name in AXES} | each.value for each in all_values
    ]
    labels = [each.label for each in all_values]
    if len(cells) <= WIDEST:
        return Sheet([""], labels, [cells])
    if axis != "seed":
        return Sheet(labels, [""], [[cell] for cell in cells])
    # The fewest empty cells, then nearest to a square: 9 are 3 x 3, 10 are 2 x 5.
    width = min(range(3, WIDEST + 1), key=lambda w: (-len(cells) % w, abs(w - len(cells) / w), -w))
    lines = [cells[at : at + width] for at in range(0, len(cells), width)]
    lines[-1] += [None] * (width - len(lines[-1]))
    seeds = [[cell[axis] for cell in line if cell is not None] for line in lines]
    rows = [f"seeds {line[0]} to {line[-1]}" if len(line) > 1 else f"seed {line[0]}" for line in seeds]
    return Sheet(rows, [""] * width, lines)
