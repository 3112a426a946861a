"""Show a comparison of two adapters: tables for the terminal, a plot, and one self-contained HTML file."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..io.atomic import write_text
from .compare import Comparison, Pair, Similarity
from .heatmap import Grid, grids, placed
from .heatmap import plot as plot_panels
from .tables import Table, escaped, html_page, mean, printable

OF = {
    "A": "right singular directions of A",
    "B": "left singular directions of B",
    "right": "inputs of ΔW",
    "left": "outputs of ΔW",
}
# Columns: head, format, value of a module.
Column = tuple[str, str, Callable[[Pair], float | None]]
_SIZES: tuple[Column, ...] = (
    ("rank A", ".0f", lambda p: p.ranks[0]),
    ("B", ".0f", lambda p: p.ranks[1]),
    ("|ΔW| A", ".3g", lambda p: p.norms[0]),
    ("B", ".3g", lambda p: p.norms[1]),
    ("angle° in", ".1f", lambda p: p.angles_in[0] if p.angles_in else None),
    ("angle° out", ".1f", lambda p: p.angles_out[0] if p.angles_out else None),
)
_EFFECTS: tuple[Column, ...] = (
    ("cosine", "+.3f", lambda p: p.cosine),
    ("φ in", ".3f", lambda p: p.phi_in),
    ("φ out", ".3f", lambda p: p.phi_out),
    ("A by B", ".3f", lambda p: p.a_by_b.change if p.a_by_b else None),
    ("gain", "+.3f", lambda p: p.a_by_b.gain if p.a_by_b else None),
    ("B by A", ".3f", lambda p: p.b_by_a.change if p.b_by_a else None),
    ("gain", "+.3f", lambda p: p.b_by_a.gain if p.b_by_a else None),
)
_MODULES = (
    "Angles: the smallest principal angle between the two input (output) subspaces. φ: at full rank, 1 if one subspace "
    "contains the other. A by B: ‖ΔW_B x‖ / ‖ΔW_A x‖ on A's inputs; gain: the part of it along A's own effect, -1 "
    "cancels it."
)
_AMPLIFICATION = (
    "W in ΔW: ‖UᵀWV‖ with U, V the first r singular directions of ΔW; in W: with those of W; in random: with random "
    "ones. factor: the amplification factor ‖ΔW‖ / ‖UᵀWV‖, how much larger ΔW is in its own directions than W is there."
)


def summary(c: Comparison) -> list[str]:
    """Return the comparison in a few lines of text."""
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


def tables(c: Comparison, every_module: bool = False, most: int = 8) -> Iterator[Table]:
    """Tables of the modules (grouped by name, or each), φ of the chosen ones (`most` rows), and ΔW compared with W."""
    if every_module:
        rows = [[p.name, *_cells([p], (*_SIZES, *_EFFECTS)), p.note] for p in c.pairs]
        heads = ["module", *(head for head, *_ in (*_SIZES, *_EFFECTS)), ""]
        yield Table("shared modules", heads, rows, _MODULES)
    elif c.pairs:
        groups: dict[str, list[Pair]] = {}
        for pair in c.pairs:
            groups.setdefault(placed(pair.name)[0], []).append(pair)
        rows = [[name, str(len(pairs)), *_cells(pairs, _EFFECTS)] for name, pairs in groups.items()]
        heads = ["module", "count", *(head for head, *_ in _EFFECTS)]
        yield Table("shared modules by name, means over the layers (--modules lists each)", heads, rows)
    for one in c.similarities:
        at = _steps(len(one.grid), most), _steps(len(one.grid[0]), most)
        title = f"φ(A, B, i, j), {one.module}, {OF[one.of]}; random subspaces: {one.chance:.3f} at full rank"
        rows = [[str(i), *(f"{one.grid[i - 1][j - 1]:.3f}" for j in at[1])] for i in at[0]]
        yield Table(title, ["i \\ j", *map(str, at[1])], rows)
    if any(c.amplifications):
        heads = ["module", "", "r", "|W|", "|ΔW|", "W in ΔW", "in W", "in random", "factor"]
        rows = []
        for pairs in zip(*c.amplifications, strict=True):
            for name, a in zip("AB", pairs, strict=True):
                figures = (a.norm_w, a.norm_delta, a.in_delta, a.in_w, a.in_random, a.factor)
                rows.append([a.module, name, str(a.rank), *(mean([figure], ".3g") for figure in figures)])
        yield Table("W in the directions of ΔW (Hu et al. 2021, Table 7)", heads, rows, _AMPLIFICATION)


def plot(c: Comparison, path: Path) -> Path:
    """Plot cosines and interference by module and layer, and φ of the chosen modules.

    The ending of `path` selects PNG or SVG; ConfigError for any other.
    """
    panels: list[Grid] = []
    for title, low, column in (
        ("cosine of ΔW", -1.0, _EFFECTS[0]),
        ("change of A's effect by B", 0.0, _EFFECTS[3]),
        ("change of B's effect by A", 0.0, _EFFECTS[5]),
    ):
        values = {pair.name: column[2](pair) for pair in c.pairs}
        # At least 0.1, so that noise between two unrelated adapters does not look significant.
        highest = max(0.1, *(abs(v) for v in values.values() if v is not None), 0.0)
        panels += grids(values, title, (low * highest, highest))
    panels += map(_phi, c.similarities)
    return plot_panels(panels, path, f"A = {c.names[0]}   B = {c.names[1]}")


def write_html(c: Comparison, path: Path) -> Path:
    """Write one HTML file with summary, inlined plot and tables: no scripts or external resources, all text escaped."""
    with tempfile.TemporaryDirectory() as folder:
        picture = plot(c, Path(folder) / "plot.png").read_bytes()
    parts = [f"<p>{escaped(line)}</p>" for line in summary(c)]
    parts.append(
        '<img alt="cosines, interference and subspace similarity" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    )
    parts += [table.html() for table in tables(c, every_module=True, most=16)]
    parts += [Table(f"Only in {n}", ["module"], [[m] for m in only]).html() for n, only in zip("AB", c.only) if only]
    write_text(path, html_page(f"{c.names[0]} and {c.names[1]}", parts))
    return path


def _cells(pairs: Sequence[Pair], columns: Sequence[Column]) -> list[str]:
    """Return the means of columns over modules."""
    return [mean([value(pair) for pair in pairs], spec) for _, spec, value in columns]


def _phi(one: Similarity) -> Grid:
    """Return φ from 0 to 1 for all i (rows) and j (columns), as in the paper's figure 3."""
    cells = {(str(i), str(j)): v for i, row in enumerate(one.grid, 1) for j, v in enumerate(row, 1)}
    rows, columns = (tuple(map(str, range(1, len(side) + 1))) for side in (one.grid, one.grid[0]))
    return Grid(f"φ of {_tail(one.module)}\n{OF[one.of]}", rows, columns, cells, (0.0, 1.0), ("i (A)", "j (B)"))


def _steps(count: int, limit: int) -> list[int]:
    """Return steps in 1..count including both ends: all if at most `limit`, otherwise powers of two."""
    if count <= limit:
        return list(range(1, count + 1))
    return [*(2**k for k in range(count.bit_length()) if 2**k < count), count]


def _tail(module: str, limit: int = 34) -> str:
    """Return the last `limit` characters of a name, for a small title."""
    return module if len(module) <= limit else "…" + module[1 - limit :]
