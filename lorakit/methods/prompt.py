"""Prompt tuning: train input embeddings in front of the tokens' own (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any

from ..config import RunSettings
from .shared import virtual_tokens
from .shared.adapter import (  # noqa: F401 (names of the method)
    activate,
    after_step,
    base_alone,
    cheaper,
    check_result,
    flags,
    keeps_base,
    note_together,
    penalty,
    precision,
    reloaded,
    result,
    save,
)
from .shared.virtual_tokens import VirtualRunSettings, alone, attach, rate_factors, start  # noqa: F401

settings = VirtualRunSettings
defaults: dict[str, Any] = {}
title = "prompt"
summary = "train input embeddings in front of the tokens"


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return virtual_tokens.learning_rate(rate, why, "prompt")


def trained(config: RunSettings) -> str:
    return virtual_tokens.described(config)
