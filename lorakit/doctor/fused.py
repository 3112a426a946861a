"""Which of lorakit's fused parts apply to which models with the installed transformers, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedPart:
    """A part of a model's step. `why`: what keeps it from being fused; empty where it is."""

    model: str
    part: str
    fused: bool
    why: str = ""


def fused_report() -> list[FusedPart]:
    """By model and part. `lorakit doctor` shows the section where there is something to show."""
    return []
