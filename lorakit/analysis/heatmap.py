"""Heat maps of a quantity over an adapter's modules and layers, for the terminal and as an image.

A module's name is split at its layer: `model.layers.3.self_attn.q_proj` becomes `self_attn.q_proj` of layer 3, and
`unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q` becomes `attn1.to_q` of layer `down 1.0.0`. Each part
of a pipeline (`unet`, `text_encoder`...) gets its own map.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..io.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

# Name parts whose number counts layers. `to_out.0`, `net.2` and `experts.5` count something else.
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers?|\w*blocks?|h|resnets|attentions|\w*samplers)\.\d+(?=\.|$)")
# GPT-2's names begin with "transformer.h."
_PARTS = re.compile(r"(unet|transformer|text_encoder(?:_[23])?|prior|vae)\.(?!h\.)")
# Dark to bright with even steps of lightness: readable in greyscale and with colour blindness.
_RAMP = ((13, 8, 60), (84, 15, 109), (158, 40, 100), (219, 80, 59), (250, 156, 27), (246, 232, 120))
GREY = "#d4d4d4"


@dataclass(frozen=True)
class Grid:
    """One heat map: `values[row, layer]`, None for an unknown value."""

    title: str
    rows: tuple[str, ...]
    layers: tuple[str, ...]
    values: Mapping[tuple[str, str], float | None]

    def range(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        """The colour scale's limits: `low` and `high`, by default the smallest and largest value."""
        known = [v for v in self.values.values() if v is not None and math.isfinite(v)] or [0.0]
        return (min(known) if low is None else low, max(known) if high is None else high)

    def tables(self, width: int = 80) -> Iterator[Table]:
        """Tables for a terminal of `width` columns: one line per layer, one column per module, split if too wide."""
        margin = max(5, *map(len, self.layers)) + 1
        batch: list[str] = []
        for row in self.rows:
            if batch and margin + sum(_width(r) + 1 for r in (*batch, row)) > width:
                yield self._table(batch)
                batch = []
            batch.append(row)
        yield self._table(batch)

    def _table(self, rows: Sequence[str]) -> Table:
        """A table of these modules, with the layers that contain at least one of them."""
        from rich.style import Style
        from rich.table import Table
        from rich.text import Text

        lowest, highest = self.range()
        table = Table(
            title=Text(printable(self.title)), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
        )
        table.add_column("layer", justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            table.add_column(
                Text("\n".join(map(printable, row.split(".")))), justify="center", no_wrap=True, vertical="bottom"
            )
        for layer in self.layers:
            cells = [Text(printable(layer))]
            for row in rows:
                value = self.values.get((row, layer))
                if value is None:
                    cells.append(Text("?" if (row, layer) in self.values else ""))
                    continue
                r, g, b = colour(value, lowest, highest)
                ink = "white" if is_dark(r, g, b) else "black"
                cells.append(
                    Text(f"{short(value):^{_width(row)}}", style=Style(color=ink, bgcolor=f"rgb({r},{g},{b})"))
                )
            if any(cell.plain for cell in cells[1:]):
                table.add_row(*cells)
        return table

    def draw(self, ax: Axes, low: float | None = None, high: float | None = None) -> Any:
        """Draw on matplotlib's axes, modules as rows and layers as columns. Returns the image, for a colour bar."""
        import numpy
        from matplotlib.colors import LinearSegmentedColormap

        lowest, highest = self.range(low, high)
        colours = LinearSegmentedColormap.from_list(
            "lorakit", [tuple(c / 255 for c in step) for step in _RAMP]
        ).with_extremes(bad=GREY)
        cells = numpy.full((len(self.rows), len(self.layers)), numpy.nan)
        for (row, layer), value in self.values.items():
            if value is not None and math.isfinite(value):
                cells[self.rows.index(row), self.layers.index(layer)] = value
        image = ax.imshow(
            cells, cmap=colours, vmin=lowest, vmax=highest if highest > lowest else lowest + 1e-12, aspect="auto"
        )
        step = -(-len(self.layers) // 48)
        ticks = range(0, len(self.layers), step)
        long_labels = max(map(len, self.layers), default=0) > 3
        ax.set_xticks(ticks, [literal(self.layers[i]) for i in ticks], rotation=90 if long_labels else 0, fontsize=7)
        ax.set_yticks(range(len(self.rows)), [literal(row) for row in self.rows], fontsize=8)
        ax.set_xlabel("layer")
        ax.set_title(literal(self.title), loc="left", fontsize=10)
        if len(self.layers) <= 16:
            for (row, layer), value in self.values.items():
                if value is not None and math.isfinite(value):
                    dark = is_dark(*colour(value, lowest, highest))
                    ax.text(
                        self.layers.index(layer),
                        self.rows.index(row),
                        short(value),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
        return image


def grids(values: Mapping[str, float | None], what: str) -> list[Grid]:
    """Heat maps of module -> value, one per part of a pipeline. `what`: the quantity, for the titles."""
    split = {
        module: (match[1], module[match.end() :]) if (match := _PARTS.match(module)) else ("", module)
        for module in values
    }
    counts = Counter((part, placed(name)) for part, name in split.values())
    parts: dict[str, dict[tuple[str, str], float | None]] = {}
    for module, value in values.items():
        part, name = split[module]
        row, layer = placed(name)
        if counts[part, (row, layer)] > 1:  # T5's encoder and decoder both have a layer 3: use the full prefix
            layer = name.removesuffix(f".{row}")
        parts.setdefault(part, {})[row, layer] = value
    maps = []
    for part, cells in parts.items():
        rows, layers = (
            tuple(dict.fromkeys(row for row, _ in cells)),
            tuple(sorted({layer for _, layer in cells}, key=_natural)),
        )
        maps.append(Grid(f"{what}, {part}" if part else what, rows, layers, cells))
    return maps


def placed(module: str) -> tuple[str, str]:
    """(the module's name within its layer, the layer's label), or (name, "") outside of layers."""
    layers = list(_LAYER.finditer(module))
    if not layers:
        return module, ""
    last = layers[-1]
    row = module[last.end() + 1 :] or module[last.start() :].lstrip(".").rsplit(".", 1)[0]
    within = module[: last.end()]
    numbers = ".".join(part for part in within.split(".") if part.isdigit())
    stack = re.search(r"(?:^|\.)(\w+?)_blocks?(?=\.|$)", within)  # "down" of down_blocks
    return row, f"{stack[1]} {numbers}" if stack else numbers


def _natural(label: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", label)]


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """RGB (0 to 255) of a value on the colour scale from `low` to `high`; grey if not finite."""
    if not math.isfinite(value):
        return (212, 212, 212)
    at = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
    step = min(int(at * (len(_RAMP) - 1)), len(_RAMP) - 2)
    part = at * (len(_RAMP) - 1) - step
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_RAMP[step], _RAMP[step + 1], strict=True))
    return red, green, blue


def is_dark(red: int, green: int, blue: int) -> bool:
    """Whether white text is more readable than black on this colour (RGB, 0 to 255)."""
    return 0.3 * red + 0.6 * green + 0.1 * blue < 110


def _width(row: str) -> int:
    """Column width in characters: the longest part of its title, at least 7."""
    return max(7, *map(len, row.split(".")))


def short(value: float) -> str:
    """Format a value in at most six characters."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def printable(text: str) -> str:
    """Text from a file, with control characters replaced, safe for a terminal or a page."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def literal(text: str) -> str:
    """Escape text for matplotlib, where a dollar sign would start a formula."""
    return printable(text).replace("$", r"\$")


def plot(maps: list[Grid], path: Path, title: str) -> Path:
    """Draw heat maps below each other into a PNG or SVG, by the path's ending. ConfigError for another ending."""
    heights = [0.9 + 0.24 * len(grid.rows) for grid in maps]
    width = max(5.0, 2.4 + 0.2 * max(len(grid.layers) for grid in maps))
    with canvas(path, (min(width, 20), sum(heights) + 0.4), title) as figure:
        axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)
        for ax, grid in zip(axes.flat, maps):
            figure.colorbar(grid.draw(ax), ax=ax, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
    return path


@contextmanager
def canvas(path: Path, size: tuple[float, float], title: str) -> Iterator[Any]:
    """Yield a figure of `size` (inches), saved to `path` when the block ends.

    Avoids pyplot, which keeps figures and picks a backend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = kind_of(path)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format=kind)


def kind_of(path: Path) -> str:
    """Return "png" or "svg" by the ending; ConfigError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"--plot {path}: expected a file name ending in .png or .svg")
    return kind
