"""Write `report.html`: a run's figures, loss curves, samples of base and tuned model, data facts and settings.

One page without scripts or external resources, for light and dark screens and for phones. report.html.jinja is its
body, here is what goes into it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.tables import Table, html_page, printable
from ..errors import TrainError
from ..io.atomic import write_text
from ..tasks import task_of
from ..tasks.task import Shown
from ..version import VERSION
from .chart import chart
from .config import TrainConfig
from .run_folder import FIXED, RunFolder, evaluated

if TYPE_CHECKING:
    from jinja2 import Template

MOST_EVALUATIONS = 30  # rows of their table: the last ones
STYLE = """
.picture { image-rendering: pixelated; max-width: 100%; height: auto; }
.lead { color: var(--muted); font-size: 1rem; margin-top: -.4rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.figures div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dl, dd { margin: 0; } dt { color: var(--muted); font-size: .8rem; } dd { overflow-wrap: anywhere; }
.figures dd { font-size: 1.25rem; font-weight: 600; }
.figures .note { font-size: .8rem; font-weight: 400; color: var(--muted); }
.legend { font-size: .85rem; color: var(--muted); } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend span::before { content: "━ "; color: var(--train); } .legend .held::before { color: var(--held); }
.legend .best::before { content: "○ "; color: var(--held); font-weight: 700; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--muted); font-size: 14px; }
svg .axis { fill: var(--text); } .grid, .tick { stroke: var(--line); }
polyline { fill: none; stroke-linejoin: round; } polyline.train { stroke: var(--train); stroke-width: 1.5; }
polyline.held { stroke: var(--held); stroke-width: 2.5; } circle.held { fill: var(--held); }
circle.best { fill: none; stroke: var(--held); stroke-width: 2; }
.sample { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 1rem; padding: .7rem 0; }
.sample { border-top: 1px solid var(--line); } .sample dd { white-space: pre-wrap; font-size: .9rem; }
.sample .tuned dt { color: var(--held); }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.2rem; font-size: .9rem; }
footer { margin: 2.5rem 0 1rem; color: var(--muted); font-size: .8rem; }
@media (max-width: 40rem) {
  .sample { grid-template-columns: minmax(0, 1fr); gap: .5rem; } svg text { font-size: 27px; }
  polyline.train { stroke-width: 2.5; } polyline.held { stroke-width: 4; } circle.held { r: 5px; }
  .facts { grid-template-columns: minmax(0, 1fr); } .facts dd { margin-bottom: .4rem; }
}
"""

Facts = Sequence[tuple[str, str]]


def write_report(folder: RunFolder, config: TrainConfig, facts: Facts = ()) -> None:
    """Write a run's report from its metrics.jsonl and newest samples. `facts`: what was chosen and why, by name."""
    rows = folder.rows()
    held = [_plain(row, prefix) for row in rows if (prefix := evaluated(row))]
    on = "training rows, fixed noise" if any(evaluated(row) == FIXED for row in rows) else "held-out rows"
    settings = [(name, str(value)) for name, value in config.model_dump(exclude_defaults=True).items()]
    which, samples = _samples(folder, config)
    drawn = chart(
        [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None],
        [(row["step"], row["loss"]) for row in held if row["loss"] is not None],
    )
    body = _template().render(
        lead=f"{config.model}, trained on {Path(config.data).name}",
        figures=_figures(rows, held, task_of(config.task).unit, on),
        chart=drawn,
        evaluated_on=on,
        samples=samples.texts,
        picture=_data_uri(samples.picture),
        which_samples=which,
        sections=[
            (title, part)
            for title, part in (("The run", facts), ("Settings that differ from the defaults", settings))
            if part
        ],
        evaluations=_evaluations(held, on),
        version=VERSION,
    )
    write_text(folder.report, html_page(folder.path.resolve().name, [body], STYLE))


def _plain(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return an evaluation with its metrics' own names."""
    return {name.removeprefix(prefix): value for name, value in row.items()}


def _figures(
    rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]], unit: str, on: str
) -> list[tuple[str, str, str]]:
    """List what to read first: (name, value, note). `unit`: what the run's losses are means of, such as tokens; `on`:
    what was evaluated.
    """
    figures = []
    if known := [row for row in held if row["loss"] is not None]:
        best = min(known, key=lambda row: row["loss"])
        kind = "held-out loss" if on == "held-out rows" else "loss on fixed noise"
        figures.append((f"best {kind}", f"{best['loss']:.4f}", f"step {best['step']:,}"))
        if known[0]["step"] == 0:
            figures.append((f"the base's {kind}", f"{known[0]['loss']:.4f}", ""))
        figures += [
            (name, f"{best[key]:.4f}" if best[key] < 1 else f"{best[key]:.2f}", f"on {on}")
            for key, name in _measures(best).items()
            if name != "loss" and best[key] is not None
        ]
    if trained := [row for row in rows if row.get("loss") is not None]:
        last = trained[-1]
        figures.append(("training loss", f"{last['loss']:.4f}", "the last step"))
        figures.append(("steps", f"{last['step']:,}", ""))
        if seconds := last.get("seconds"):
            total = sum(row.get(unit, 0) for row in trained)
            figures.append(("training time", duration(seconds), ""))
            figures.append((f"trained {unit}", f"{total:,}", f"{total / seconds:,.0f} a second"))
    return figures


def _measures(row: dict[str, Any]) -> dict[str, str]:
    """Return the measures of an evaluation: key -> name."""
    return {key: key.replace("_", " ") for key in row if key != "step"}


def _evaluations(held: Sequence[dict[str, Any]], on: str) -> Any:
    """Return a table of the evaluations as HTML; "" if there are less than two."""
    from markupsafe import Markup

    if len(held) < 2:
        return ""
    names = _measures(held[0])
    cells = [
        [f"{row['step']:,}", *("" if row.get(key) is None else f"{row[key]:.4f}" for key in names)]
        for row in held[-MOST_EVALUATIONS:]
    ]
    note = f"The last {MOST_EVALUATIONS} of {len(held)}." if len(held) > MOST_EVALUATIONS else ""
    table = Table(f"Evaluations on the {on}", ["step", *names.values()], cells, note)
    return Markup(table.html())  # `html` escapes


def _samples(folder: RunFolder, config: TrainConfig) -> tuple[str, Shown]:
    """Return where the newest samples are from, or what is wrong with them, and the samples."""
    sampled = folder.sampled()
    if not sampled:
        return "There are no samples.", Shown()
    step, path = sampled[-1]
    try:
        return f"At step {step:,}.", task_of(config.task).read_samples(path)
    except TrainError as error:
        return str(error), Shown()


def _data_uri(png: bytes | None) -> str:
    """Return a picture to embed in the page; "" for none."""
    return "" if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters["text"] = lambda text: "\n".join(map(printable, str(text).split("\n")))
    return environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf8"))


def duration(seconds: float) -> str:
    """Format a time: 34 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
