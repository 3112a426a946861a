"""Write `report.html`: loss curves, samples of base and tuned model, and settings, on one page without scripts."""

from __future__ import annotations

import html
import json
from typing import Any

from ..io.atomic import write_text
from .config import TrainConfig
from .run_folder import RunFolder

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem "
    ".6rem;text-align:left;vertical-align:top;white-space:pre-wrap}"
    "svg{width:100%;height:auto}.train{stroke:#9ab;fill:none}.held{stroke:#c40;fill:none;stroke-width:2}text{font-size:12px;fill:#555}"
)


def write_report(folder: RunFolder, config: TrainConfig) -> None:
    """Write a run's report from its metrics.jsonl and newest samples."""
    rows = folder.rows()
    changed = config.model_dump(exclude_defaults=True)
    settings = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in changed.items())
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(str(folder.path))}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(folder.path.name)}</h1>{_chart(rows)}<h2>Samples</h2>{_samples(folder)}<h2>Settings that "
        "differ from the defaults</h2>"
        f"<table>{settings}</table>"
    )
    write_text(folder.report, page)


def _chart(rows: list[dict[str, Any]], width: int = 800, height: int = 300, edge: int = 45) -> str:
    curves = {
        "train": [(r["step"], r["loss"]) for r in rows if "loss" in r],
        "held": [(r["step"], r["held_out_loss"]) for r in rows if "held_out_loss" in r],
    }
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return "<p>Nothing was logged.</p>"
    most_x = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        return f"{edge + (width - 2 * edge) * x / most_x:.1f},{edge + (height - 2 * edge) * (high - y) / span:.1f}"

    lines = "".join(
        f'<polyline class="{name}" points="{" ".join(place(x, y) for x, y in curve)}"/>'
        for name, curve in curves.items()
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by step">{lines}'
        f'<text x="4" y="{edge}">{high:.3g}</text><text x="4" y="{height - edge}">{low:.3g}</text>'
        f'<text x="{width - edge}" y="{height - 15}" text-anchor="end">step {most_x}</text>'
        f'<text x="{edge}" y="20">loss of each step (grey) and on held-out rows (red)</text></svg>'
    )


def _samples(folder: RunFolder) -> str:
    files = folder.sampled()
    if not files:
        return "<p>There are no samples.</p>"
    try:
        rows = json.loads(files[-1][1].read_bytes())
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(row[k])}</td>" for k in ("prompt", "base", "tuned")) + "</tr>"
            for row in rows
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"<p>{html.escape(files[-1][1].name)} is damaged.</p>"
    return f"<table><tr><th>prompt</th><th>base</th><th>tuned</th></tr>{cells}</table>"
