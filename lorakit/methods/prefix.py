"""Prefix tuning: train keys and values in front of each layer's own (Li & Liang 2021)."""

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
title = "prefix"
summary = "train keys and values in front of each layer's"


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return virtual_tokens.learning_rate(rate, why, "prefix")


def trained(config: RunSettings) -> str:
    return virtual_tokens.described(config)
