"""`lorakit image`: pictures. One verb, one file, as in the folder above."""

from __future__ import annotations

from pathlib import Path

HELP = {
    "train": "train an adapter for a diffusion pipeline on pictures",
    "generate": "draw pictures with a pipeline and adapters",
}
VERBS = {verb: text for verb, text in HELP.items() if (Path(__file__).parent / f"{verb}.py").is_file()}
