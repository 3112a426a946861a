"""Plot a sweep: held-out loss by step for every run, and the loss against each swept setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analysis.fonts import fonts_for
from ...analysis.heatmap import literal
from ...io.atomic import replacing
from .leaderboard import Entry
from .sweep_config import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMED = 12  # curves in the legend: the best ones
BEST, OTHERS = "#c2410c", "#64748b"


def plot(ranked: Sequence[Entry], swept: Sequence[str], path: Path, title: str) -> bool:
    """Plot one group's runs to a PNG at `path`. Returns False, and writes nothing, if there is nothing to plot."""
    done = [entry for entry in ranked if entry.score is not None]
    if not done:
        return False
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [setting for setting in swept if len({str(e.settings[setting]) for e in done}) > 1]
    curves = any(len(entry.curve) > 1 for entry in done)
    columns = int(curves) + len(panels)
    if not columns:
        return False
    wide = min(columns, 3)
    tall = -(-columns // wide)
    # No global state: matplotlib.pyplot would keep the figure, and choose a backend.
    texts = [title, *swept, *(entry.name for entry in done), *(short(v) for e in done for v in e.settings.values())]
    rc: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(rc), fonts_for(texts) as missing:
        figure = Figure(figsize=(5.2 * wide, 3.8 * tall), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(tall, wide, squeeze=False).flat)
        figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11)
        if missing:
            figure.supxlabel(missing, x=0.01, ha="left", fontsize=7)
        if curves:
            _curves(axes[0], done)
        for ax, setting in zip(axes[int(curves) :], panels):
            _against(ax, done, setting)
        for ax in axes[columns:]:
            ax.set_axis_off()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    return True


def _curves(ax: Axes, done: Sequence[Entry]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["viridis"]
    for i, entry in reversed(list(enumerate(done))):  # the best on top
        steps, losses = zip(*entry.curve, strict=True) if entry.curve else ((), ())
        colour = BEST if i == 0 else colours(i / max(1, len(done) - 1) * 0.9)
        ax.plot(
            steps,
            losses,
            color=colour,
            linewidth=2.2 if i == 0 else 1.1,
            alpha=1 if i == 0 else 0.85,
            marker=".",
            markersize=4,
            label=literal(entry.name) if i < MOST_NAMED else None,
        )
    low, top = min(loss for e in done for _, loss in e.curve), max(e.curve[0][1] for e in done if e.curve)
    room = (top - low) or 1.0
    ax.set_ylim(low - 0.03 * room, top + 0.05 * room)  # a diverging run may leave the plot
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("held-out loss")
    handles, labels = ax.get_legend_handles_labels()
    more = f" (the best {MOST_NAMED} of {len(done)})" if len(done) > MOST_NAMED else ""
    ax.legend(handles[::-1], labels[::-1], fontsize=7, frameon=False, title=f"best first{more}", title_fontsize=7)


def _against(ax: Axes, done: Sequence[Entry], setting: str) -> None:
    """Plot each run's loss against one setting, and a line through the lowest loss at each value."""
    values = [entry.learning_rate if setting == "learning_rate" else entry.settings[setting] for entry in done]
    losses = [entry.score for entry in done if entry.score is not None]  # all of `done` have one
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    order: list[Any] = sorted(set(values)) if numeric else list(dict.fromkeys(map(short, values)))
    places = values if numeric else [order.index(short(value)) for value in values]
    best = [
        min(loss for at, loss in zip(places, losses, strict=True) if at == x)
        for x in (order if numeric else range(len(order)))
    ]
    ax.scatter(places, losses, s=22, color=OTHERS, alpha=0.7, zorder=3)
    ax.plot(
        order if numeric else range(len(order)), best, color=BEST, linewidth=1.6, zorder=2, marker="o", markersize=4
    )
    if numeric and min(order) > 0 and max(order) / min(order) >= 4:
        ax.set_xscale("log")
    ax.set_xticks(
        order if numeric else range(len(order)),
        [literal(short(value)) for value in order],
        rotation=0 if len(order) < 7 else 45,
    )
    ax.minorticks_off()
    ax.set_xlabel(setting)
    ax.set_ylabel("loss (line: lowest at each value)")
