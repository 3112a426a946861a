"""How `lorakit demo --image` shows its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ...reproduce.demo_image import ImageOutcome


def table(outcome: ImageOutcome) -> Table:
    """Return the figures as a table: one row a measure, with what it is to show."""
    from rich.table import Table

    figures = outcome.figures
    style, subject, slider, stacked = (figures[name] for name in ("style", "subject", "slider", "stacked"))
    kinds = {name: len(names) for name, names in subject["kinds_of_animals"].items() if names is not None}
    result = Table(title="embedded image model, judged by a classifier of 72 objects")
    for column in ("LoRA", "measure", "figures"):
        result.add_column(column)
    left = {scale: distance / style["distance"]["0"] for scale, distance in style["distance"].items()}
    result.add_row("style", "distance left to the style, at scale 0, 0.5, 1", _row(left, _percent))
    result.add_row("", "object recognized, at scale 0, 0.5, 1", _row(style["objects"], _percent))
    result.add_row("subject", "recognized: base, LoRA", _row(subject["recognized"], _percent))
    result.add_row(
        "", f"kinds of animals in {subject['samples']} times 'an animal': {', '.join(kinds)}", _row(kinds, str)
    )
    result.add_row(
        "slider", f"area of the object, at scale {', '.join(slider['area'])}", _row(slider["area"], _percent)
    )
    weights = ", ".join(f"{name} {weight:g}" for name, weight in stacked["weights"].items())
    result.add_row("both", f"{weights}: subject recognized", _percent(stacked["recognized"]))
    return result


def lines(outcome: ImageOutcome) -> list[str]:
    """Return the lines below the table: merge, files, picture and time."""
    trained = ", ".join(f"{adapter.name} {adapter.seconds:.0f} s" for adapter in outcome.adapters)
    return [
        f"merged pipeline and adapters: largest difference of a pixel {outcome.merged_difference} of 255",
        f"trained: {trained}; written for diffusers, and for A1111 and ComfyUI: {outcome.adapters[0].files['kohya']}",
        f"picture: {outcome.picture}; {outcome.seconds:.0f} s in all",
    ]


def _row(values: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    return "  ".join(shown(value) for value in values.values())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
