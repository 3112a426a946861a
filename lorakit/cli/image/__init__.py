"""`lorakit image`: pictures. One verb, one file, as in the folder above."""

from __future__ import annotations

VERBS = {
    "train": "train an adapter for a diffusion pipeline on pictures",
    "generate": "draw pictures with a pipeline and adapters",
}
