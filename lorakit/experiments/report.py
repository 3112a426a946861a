"""Write a table's results: JSON, Markdown and a plot in the folder of `lorakit reproduce`; all tables on one page.

OUT/NAME.json     what was measured, on which machine, with which command and CPU seconds
    NAME.md       the table and what it says of the paper
    NAME.png      its plot, if it has one
    experiments.md   all tables that are there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.atomic import replacing, write_text
from .suite import NAMES, PAPER, Budget, Experiment, Result, load

PAGE = "experiments.md"


def command(name: str, budget: Budget) -> str:
    """Return the command that makes a table with this budget."""
    return f"lorakit reproduce {name}{budget.flags()}"


def store(
    out: Path, name: str, result: Result, command: str, seconds: float, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what was measured, and return it."""
    content = {"table": name, "command": command, "seconds": round(seconds, 1), "machine": dict(machine)}
    content["result"] = result
    write_text(out / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


def measured(out: Path) -> list[str]:
    """List the tables that are stored. Raises ConfigError if there are none."""
    names = [name for name in NAMES if (out / f"{name}.json").exists()]
    if not names:
        raise ConfigError(f"{out} has no tables\n  measure some first: lorakit reproduce --out {out}")
    return names


def stored(out: Path, name: str) -> dict[str, Any]:
    """Read what was measured. Raises ConfigError if it is not there or damaged."""
    path = out / f"{name}.json"
    if not path.exists():
        raise ConfigError(f"{path} does not exist\n  measure it first: lorakit reproduce {name} --out {out}")
    try:
        content = json.loads(path.read_bytes())
        if not {"command", "seconds", "machine", "result"} <= set(content):
            raise ValueError("a part is missing")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error})\n  measure the table again: --force") from error
    return content


def draw(out: Path, name: str, content: Mapping[str, Any]) -> list[Path]:
    """Write the table as Markdown and its plot, and the page of all tables. Returns the files."""
    files = [out / f"{name}.md"]
    experiment = load(name)
    image = _plot(out / f"{name}.png", experiment, content["result"])
    write_text(files[0], markdown(name, experiment, content, image))
    files += [image] if image else []
    parts = [out / f"{other}.md" for other in NAMES]
    pages = [path.read_text(encoding="utf8") for path in parts if path.exists()]
    write_text(out / PAGE, f"# The paper's experiments\n\n{PAPER}.\n\n" + "\n".join(pages))
    return files


def markdown(name: str, experiment: Experiment, content: Mapping[str, Any], image: Path | None) -> str:
    """Return a table's section: what it compares, its command and time, the table, the findings, the plot."""
    from ..share.markdown import plain, table

    result, machine = content["result"], content["machine"]
    lines = [f"## {name}: {NAMES[name]}", "", " ".join(experiment.TITLE.split()), ""]
    facts = f"{content['seconds']:.0f} CPU seconds; {machine['cpu']}, {machine['cores']} cores"
    lines += [
        f"    {content['command']}",
        "",
        f"({facts}; lorakit {machine['lorakit']}, torch {machine['torch']}.)",
        "",
    ]
    for each in experiment.tables(result):
        lines += [f"**{each.title}**", ""] if each.title else []
        lines += [
            table([list(map(plain, row)) for row in each.cells], [head.replace("\n", " ") for head in each.heads])
        ]
        lines += [""]
    found = experiment.findings(result)
    if found:
        rows = [[plain(f.claim), f.verdict, plain(f.figures)] for f in found]
        lines += [table(rows, ["the paper says", "here", "figures"]), ""]
    lines += [f"![{NAMES[name]}]({image.name})", ""] if image else []
    return "\n".join(lines)


def _plot(path: Path, experiment: Experiment, result: Result) -> Path | None:
    """Save the table's plot; None if it has no plot."""
    plot = getattr(experiment, "plot", None)
    if plot is None:
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        plot(result, figure)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=90, format="png")
    return path
