"""The model card of the exported folder: what it is, how it was made, and the judge's table as it was measured."""

from __future__ import annotations

import json
from pathlib import Path

from .denoiser import ROWS as DENOISER_ROWS
from .evaluate import GUIDANCE, table

TEMPLATE = Path(__file__).with_name("card.md")


def card(folder: Path) -> str:
    """The text, with the figures of evaluation.json and training.json."""
    measures = json.loads((folder / "evaluation.json").read_text(encoding="utf8"))
    training = json.loads((folder / "training.json").read_text(encoding="utf8"))
    steps = training["steps"]
    return TEMPLATE.read_text(encoding="utf8").format(
        parameters=training["parameters"] / 1e6,
        megabytes=measures["weights, MB"],
        steps=measures["steps"],
        guidance=GUIDANCE,
        table="\n".join(table(measures)),
        autoencoder=", ".join(f"{name} {value:.1f} dB" for name, value in measures["autoencoder, dB"].items()),
        trained=f"denoiser {steps['denoiser']:,} steps of {DENOISER_ROWS}, autoencoder {steps['autoencoder']:,}, "
        f"judge {steps['judge']:,}",
    )
