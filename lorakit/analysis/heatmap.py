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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..io.atomic import replacing
from ..module_names import is_language_trunk
from .fonts import fonts_for
from .tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table
    from rich.text import Text

# Name parts whose number counts layers. `to_out.0`, `net.2` and `experts.5` count something else.
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers?|\w*blocks?|h|resnets|attentions|\w*samplers)\.\d+(?=\.|$)")
_PARTS = re.compile(r"(unet|transformer|text_encoder(?:_[23])?|prior|vae)\.")
# Dark to bright with even steps of lightness: readable in greyscale and with colour blindness.
COLOURS = "inferno"
GREY = "#d4d4d4"


def _part(module: str) -> re.Match[str] | None:
    """The component of a pipeline that a module's name begins with."""
    return None if is_language_trunk(module) else _PARTS.match(module)


@dataclass(frozen=True)
class Grid:
    """One heat map: `values[row, layer]`, None for an unknown value.

    limits: of the colour scale, by default the smallest and the largest value. axes: what the rows and columns count,
    in a small plot; by default modules and layers.
    """

    title: str
    rows: tuple[str, ...]
    layers: tuple[str, ...]
    values: Mapping[tuple[str, str], float | None]
    limits: tuple[float, float] | None = None
    axes: tuple[str, str] | None = None

    @property
    def known(self) -> dict[tuple[str, str], float]:
        """The finite values."""
        return {key: value for key, value in self.values.items() if value is not None and math.isfinite(value)}

    @property
    def range(self) -> tuple[float, float]:
        """The colour scale's limits."""
        known = self.known.values()
        return self.limits or (min(known, default=0.0), max(known, default=0.0))

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
        from rich.table import Table
        from rich.text import Text

        title = Text(printable(self.title))
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("layer", justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            head = Text("\n".join(map(printable, row.split("."))))
            table.add_column(head, justify="center", no_wrap=True, vertical="bottom")
        for layer in self.layers:
            if any((row, layer) in self.values for row in rows):
                table.add_row(Text(printable(layer)), *(self._cell(row, layer) for row in rows))
        return table

    def _cell(self, row: str, layer: str) -> Text:
        from rich.text import Text

        value = self.values.get((row, layer))
        if value is None:
            return Text("?" if (row, layer) in self.values else "")
        red, green, blue = colour(value, *self.range)
        ink = "white" if is_dark(red, green, blue) else "black"
        return Text(f"{short(value):^{_width(row)}}", style=f"{ink} on rgb({red},{green},{blue})")

    @property
    def height(self) -> float:
        """Of the plot, in inches."""
        return 1.1 + 0.24 * len(self.rows) if self.axes is None else 3.4

    @property
    def width(self) -> float:
        return 2.4 + 0.2 * len(self.layers) if self.axes is None else 3.2

    def draw(self, ax: Axes) -> None:
        """Draw on matplotlib's axes, modules as rows and layers as columns, with a colour bar."""
        import numpy
        from matplotlib import colormaps

        lowest, highest = self.range
        cells = numpy.full((len(self.rows), len(self.layers)), numpy.nan)
        for (row, layer), value in self.known.items():
            cells[self.rows.index(row), self.layers.index(layer)] = value
        colours = colormaps[COLOURS].with_extremes(bad=GREY)
        image = ax.imshow(cells, cmap=colours, vmin=lowest, vmax=max(highest, lowest + 1e-12), aspect="auto")
        ax.figure.colorbar(image, ax=ax, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
        small = self.axes is not None
        for axis, names, most in (
            (ax.xaxis, self.layers, 8 if small else 48),
            (ax.yaxis, self.rows, 8 if small else 999),
        ):
            at = range(0, len(names), -(-len(names) // most) or 1)
            axis.set_ticks(at, [literal(names[i]) for i in at], fontsize=7)
        ax.tick_params("x", rotation=90 if max(map(len, self.layers), default=0) > 3 else 0)
        ax.set_ylabel(self.axes[0] if self.axes else "", fontsize=8)
        ax.set_xlabel(self.axes[1] if self.axes else "layer", fontsize=8)
        ax.set_title(literal(self.title), loc="left", fontsize=8 if small else 10)
        for (row, layer), value in self.known.items() if not small and len(self.layers) <= 16 else ():
            ink = "white" if is_dark(*colour(value, lowest, highest)) else "black"
            x, y = self.layers.index(layer), self.rows.index(row)
            ax.text(x, y, short(value), ha="center", va="center", fontsize=7, color=ink)


def grids(values: Mapping[str, float | None], what: str, limits: tuple[float, float] | None = None) -> list[Grid]:
    """Heat maps of module -> value, one per part of a pipeline. what: the quantity, for the titles."""
    split = {
        module: (match[1], module[match.end() :]) if (match := _part(module)) else ("", module) for module in values
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
        rows = tuple(dict.fromkeys(row for row, _ in cells))
        layers = tuple(sorted({layer for _, layer in cells}, key=_natural))
        maps.append(Grid(f"{what}, {part}" if part else what, rows, layers, cells, limits))
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


def kind_of_module(module: str) -> str:
    """Return a module's name within its layer, after the part of the pipeline it belongs to, if any."""
    part = _PARTS.match(module)
    return f"{part[1]}.{placed(module[part.end() :])[0]}" if part else placed(module)[0]


def _natural(label: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", label)]


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """RGB (0 to 255) of a value on the colour scale from `low` to `high`; grey if not finite."""
    from matplotlib import colormaps

    if not math.isfinite(value):
        return (212, 212, 212)
    at = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
    red, green, blue, _ = colormaps[COLOURS](at, bytes=True)
    return int(red), int(green), int(blue)


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


def literal(text: str) -> str:
    """Escape text for matplotlib, where a dollar sign would start a formula."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def plot(panels: Sequence[Grid], path: Path, title: str) -> Path:
    """Draw panels below each other into a PNG or SVG, by the path's ending; small ones up to four in a row.

    ConfigError for another ending. Avoids pyplot, which keeps figures and picks a backend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = kind_of(path)
    rows: list[list[Grid]] = []
    for panel in panels:
        if rows and panel.axes and rows[-1][0].axes and len(rows[-1]) < 4:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    heights = [row[0].height for row in rows] or [1.0]
    width = min(20.0, max([5.0, *(sum(panel.width for panel in row) for row in rows)]))
    texts = [title, *(text for panel in panels for text in (panel.title, *panel.rows, *panel.layers))]
    with fonts_for(texts) as missing:
        figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11)
        if missing:
            figure.supxlabel(missing, x=0.01, ha="left", fontsize=7)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        for part, row in zip(parts.flat, rows):
            for ax, panel in zip(part.subplots(1, len(row), squeeze=False).flat, row):
                panel.draw(ax)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format=kind)
    return path


def kind_of(path: Path) -> str:
    """Return "png" or "svg" by the ending; ConfigError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"--plot {path}: expected a file name ending in .png or .svg")
    return kind
