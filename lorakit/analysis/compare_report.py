"""Show a comparison of two adapters: tables for the terminal, a plot, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.atomic import write_text
from .amplification import Amplification
from .compare import Comparison, Pair
from .heatmap import Grid, canvas, grids, literal, placed, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

OF = {
    "A": "right singular directions of A",
    "B": "left singular directions of B",
    "right": "inputs of ΔW",
    "left": "outputs of ΔW",
}


def summary(c: Comparison) -> list[str]:
    """The comparison in a few lines of text."""
    a, b = map(printable, c.names)
    lines = [
        f"A = {a}, B = {b}: {len(c.pairs)} modules in both, {len(c.only[0])} in A alone, {len(c.only[1])} in B alone"
    ]
    if c.bases:
        lines.append(f"trained on different bases, so similarity means little: {printable('; '.join(c.bases))}")
    if c.cosine is not None:
        lines.append(f"cosine of all ΔW: {c.cosine:.4f}")
    for one, two, change in (("A", "B", c.changes[0]), ("B", "A", c.changes[1])):
        if change is not None:
            lines.append(f"with both active, {two} changes {one}'s effect by {100 * change:.3g} % on {one}'s inputs")
    for name, only in zip("AB", c.only, strict=True):
        if only:
            shown = ", ".join(map(printable, only[:5])) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            lines.append(f"only in {name}: {shown}")
    return lines


def rows(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the module table."""
    heads = [
        "module",
        "rank A",
        "B",
        "|ΔW| A",
        "B",
        "cosine",
        "angle° in",
        "φ in",
        "angle° out",
        "φ out",
        "A by B",
        "gain",
        "B by A",
        "gain",
        "",
    ]
    return heads, [_cells(pair) for pair in c.pairs]


def tables(c: Comparison, every_module: bool = False) -> Iterator[RenderableType]:
    """Tables for the terminal: modules (grouped by name, or each), φ of the chosen ones, and ΔW compared with W."""
    if every_module:
        yield _table("shared modules", *rows(c))
    elif c.pairs:
        yield _table("shared modules by name, means over the layers (--modules lists each)", *grouped(c))
    for one in c.similarities:
        at = _steps(len(one.grid)), _steps(len(one.grid[0]))
        title = f"φ(A, B, i, j), {one.module}, {OF[one.of]}; random subspaces: {one.chance:.3f} at full rank"
        heads = ["i \\ j", *(str(j) for j in at[1])]
        yield _table(title, heads, [[str(i), *(f"{one.grid[i - 1][j - 1]:.3f}" for j in at[1])] for i in at[0]])
    if any(c.amplifications):
        heads, cells = amplification_rows(c)
        yield _table("W in the directions of ΔW (Hu et al. 2021, Table 7)", heads, cells)


def grouped(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells with one row per module name within a layer."""
    groups: dict[str, list[Pair]] = {}
    for pair in c.pairs:
        groups.setdefault(placed(pair.name)[0], []).append(pair)
    cells = []
    for name, pairs in groups.items():
        first, second = [p.a_by_b for p in pairs if p.a_by_b], [p.b_by_a for p in pairs if p.b_by_a]
        cells.append(
            [
                name,
                str(len(pairs)),
                _mean([p.cosine for p in pairs], "+.3f"),
                _mean([p.phi_in for p in pairs]),
                _mean([p.phi_out for p in pairs]),
                _mean([i.change for i in first]),
                _mean([i.gain for i in first], "+.3f"),
                _mean([i.change for i in second]),
                _mean([i.gain for i in second], "+.3f"),
            ]
        )
    return ["module", "count", "cosine", "φ in", "φ out", "A by B", "gain", "B by A", "gain"], cells


def amplification_rows(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of Table 7."""
    heads = ["module", "", "r", "|W|", "|ΔW|", "W in ΔW", "in W", "in random", "factor"]
    cells = []
    for a, b in zip(*c.amplifications, strict=True):
        for name, one in (("A", a), ("B", b)):
            norms = (one.norm_w, one.norm_delta, one.in_delta, one.in_w, one.in_random)
            factor = "" if one.factor is None else f"{one.factor:.3g}"
            cells.append([one.module, name, str(one.rank), *(f"{v:.3g}" for v in norms), factor])
    return heads, cells


def plot(c: Comparison, path: Path) -> Path:
    """Plot cosines and interference by module and layer, φ of the chosen modules, and Table 7.

    The ending of `path` selects PNG or SVG; ConfigError for any other.
    """
    maps = list(_maps(c))
    columns = max(2, min(4, len(c.similarities)))
    phi_rows = -(-len(c.similarities) // columns) if c.similarities else 0
    heights = [
        *(0.9 + 0.24 * len(grid.rows) for grid, *_ in maps),
        *([3.4] * phi_rows),
        *([2.8] if any(c.amplifications) else []),
    ]
    if not heights:
        heights = [1.0]
    width = min(20.0, max(8.0, 3.2 * columns, 3 + 0.22 * max((len(grid.layers) for grid, *_ in maps), default=0)))
    with canvas(path, (width, sum(heights) + 0.6), f"A = {c.names[0]}   B = {c.names[1]}") as figure:
        space = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        for i, (grid, low, high) in enumerate(maps):
            ax = figure.add_subplot(space[i, :])
            figure.colorbar(grid.draw(ax, low, high), ax=ax, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
        for i, one in enumerate(c.similarities):
            ax = figure.add_subplot(space[len(maps) + i // columns, i % columns])
            image = _draw_phi(ax, one.grid, f"{_tail(one.module)}\n{OF[one.of]}")
            if i == len(c.similarities) - 1:
                figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, label="φ").ax.tick_params(labelsize=7)
        if any(c.amplifications):
            _draw_amplification(figure.add_subplot(space[-1, :]), c.amplifications)
    return path


def write_html(c: Comparison, path: Path) -> Path:
    """Write one HTML file with summary, inlined plot and tables.

    No scripts, no external resources, all text escaped.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = plot(c, Path(folder) / "plot.png").read_bytes()
    parts = [*(f"<p>{_text(line)}</p>" for line in summary(c))]
    parts.append(
        '<img alt="cosines, interference and subspace similarity" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    )
    if any(c.amplifications):
        parts += [
            "<h2>W in the directions of ΔW</h2>",
            f"<p>{_text(_AMPLIFICATION)}</p>",
            _html_table(*amplification_rows(c)),
        ]
    parts += ["<h2>Shared modules</h2>", f"<p>{_text(_MODULES)}</p>", _html_table(*rows(c))]
    for one in c.similarities:
        at = _steps(len(one.grid), 16), _steps(len(one.grid[0]), 16)
        cells = [[str(i), *(f"{one.grid[i - 1][j - 1]:.3f}" for j in at[1])] for i in at[0]]
        parts += [
            f"<h2>φ(A, B, i, j) of {_text(one.module)}</h2>",
            f"<p>{_text(OF[one.of])}; random subspaces: {one.chance:.3f} at full rank</p>",
        ]
        parts.append(_html_table(["i \\ j", *(str(j) for j in at[1])], cells))
    for name, only in zip("AB", c.only, strict=True):
        if only:
            items = "".join(f"<li>{_text(module)}</li>" for module in only)
            parts += [f"<h2>Only in {name}</h2>", f"<ul>{items}</ul>"]
    title = f"{_text(c.names[0])} and {_text(c.names[1])}"
    write_text(path, _PAGE.format(title=title, style=_STYLE, body="\n".join(parts)))
    return path


_MODULES = (
    "Angles: the smallest principal angle between the two input (output) subspaces. φ: at full rank, 1 if one subspace "
    "contains the other. A by B: ‖ΔW_B x‖ / ‖ΔW_A x‖ on A's inputs; gain: the part of it along A's own effect, -1 "
    "cancels it."
)
_AMPLIFICATION = (
    "W in ΔW: ‖UᵀWV‖ with U, V the first r singular directions of ΔW; in W: with those of W; in random: with random "
    "ones. factor: the amplification factor ‖ΔW‖ / ‖UᵀWV‖, how much larger ΔW is in its own directions than W is there."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
body { background: #fff; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }
img { max-width: 100%; border: 1px solid #d0d7de; } p { margin: .3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #e4e8ec; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f6f8fa; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def _cells(p: Pair) -> list[str]:
    def number(value: float | None, spec: str = ".3f") -> str:
        return "" if value is None else format(value, spec)

    interference = [(f"{i.change:.3f}", f"{i.gain:+.3f}") if i else ("", "") for i in (p.a_by_b, p.b_by_a)]
    angles = [number(a[0] if a else None, ".1f") for a in (p.angles_in, p.angles_out)]
    return [
        p.name,
        str(p.ranks[0]),
        str(p.ranks[1]),
        f"{p.norms[0]:.3g}",
        f"{p.norms[1]:.3g}",
        number(p.cosine, "+.3f"),
        angles[0],
        number(p.phi_in),
        angles[1],
        number(p.phi_out),
        *interference[0],
        *interference[1],
        p.note,
    ]


def _mean(values: Sequence[float | None], spec: str = ".3f") -> str:
    known = [v for v in values if v is not None]
    return format(sum(known) / len(known), spec) if known else ""


def _maps(c: Comparison) -> Iterator[tuple[Grid, float, float]]:
    """Yield (heat map, minimum and maximum of its colour scale)."""
    quantities: tuple[tuple[str, Mapping[str, float | None]], ...] = (
        ("cosine of ΔW", {p.name: p.cosine for p in c.pairs}),
        ("change of A's effect by B", {p.name: p.a_by_b.change if p.a_by_b else None for p in c.pairs}),
        ("change of B's effect by A", {p.name: p.b_by_a.change if p.b_by_a else None for p in c.pairs}),
    )
    for what, values in quantities:
        # Scale to at least 0.1, so that noise between two unrelated adapters does not look significant.
        highest = max(0.1, *(abs(v) for v in values.values() if v is not None), 0.0)
        for grid in grids(values, what):
            yield grid, (-highest if what.startswith("cosine") else 0.0), highest


def _draw_phi(ax: Axes, grid: Sequence[Sequence[float]], title: str) -> Any:
    """Draw φ from 0 to 1 for all i (rows) and j (columns), as in the paper's figure 3."""
    image = ax.imshow(
        grid,
        cmap="viridis",
        vmin=0,
        vmax=1,
        origin="upper",
        extent=(0.5, len(grid[0]) + 0.5, len(grid) + 0.5, 0.5),
        aspect="auto",
    )
    ax.set_xticks(_steps(len(grid[0]), 8))
    ax.set_yticks(_steps(len(grid), 8))
    ax.tick_params(labelsize=7)
    ax.set_xlabel("j (B)", fontsize=8)
    ax.set_ylabel("i (A)", fontsize=8)
    ax.set_title("\n".join(map(literal, title.split("\n"))), fontsize=8, loc="left")
    return image


def _draw_amplification(ax: Axes, sides: tuple[list[Amplification], list[Amplification]]) -> None:
    """Draw bars of ‖ΔW‖ and of ‖UᵀWV‖ with U, V of ΔW, of W and of random directions."""
    labels = [
        f"{name}\n{_tail(one.module, 22)}"
        for pair in zip(*sides, strict=True)
        for name, one in zip("AB", pair, strict=True)
    ]
    ones = [one for pair in zip(*sides, strict=True) for one in pair]
    bars = (
        ("‖ΔW‖", "#c2410c", [o.norm_delta for o in ones]),
        ("‖UᵀWV‖, U V of ΔW", "#475569", [o.in_delta for o in ones]),
        ("of W", "#94a3b8", [o.in_w for o in ones]),
        ("of random", "#cbd5e1", [o.in_random for o in ones]),
    )
    for k, (name, colour, heights) in enumerate(bars):
        ax.bar([i + 0.2 * (k - 1.5) for i in range(len(ones))], heights, 0.18, color=colour, label=name)
    ax.set_yscale("log")
    ax.set_xticks(
        range(len(labels)),
        ["\n".join(map(literal, label.split("\n"))) for label in labels],
        fontsize=7,
        rotation=30 if len(labels) > 6 else 0,
    )
    ax.set_title("W in the directions of ΔW", loc="left", fontsize=10)
    ax.legend(fontsize=7, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))


def _steps(count: int, limit: int = 8) -> list[int]:
    """Ticks in 1..count including both ends: all if at most `limit`, otherwise powers of two."""
    if count <= limit:
        return list(range(1, count + 1))
    powers = [2**k for k in range(count.bit_length()) if 2**k < count]
    return [*powers, count]


def _tail(module: str, limit: int = 34) -> str:
    """The last `limit` characters of a name, for a small title."""
    return module if len(module) <= limit else "…" + module[1 - limit :]


def _table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(
            Text(head), justify="right" if i else "left", overflow="fold", no_wrap=i > 0, vertical="bottom"
        )
    for row in cells:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return Group(Text(printable(title), style="italic"), table)


def _html_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>\n" for row in cells)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _text(text: str) -> str:
    return html.escape(printable(text))
