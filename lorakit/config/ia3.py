"""Settings of (IA)³."""

from __future__ import annotations

from pydantic import Field

from .strict import Strict


class Ia3Settings(Strict):
    feedforward: list[str] | None = Field(
        None,
        description="(IA)³: modules whose inputs are scaled, rather than their outputs, as name endings; default: the "
        "output projections of the feed-forwards",
    )
