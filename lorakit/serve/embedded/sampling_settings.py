"""Refuse sampling settings that cannot be computed, before a request gets a row: one of them would break its batch."""

from __future__ import annotations

import math

from ..engine import Sampling
from ..errors import Cannot


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raise Cannot, by the setting's name, for a value out of range. vocabulary: tokens of the base."""
    for name, value, expected, good in (
        ("temperature", sampling.temperature, "0 (greedy) or a positive number", 0 <= sampling.temperature < math.inf),
        ("top_p", sampling.top_p, "a probability from 0 to 1", 0 <= sampling.top_p <= 1),
        ("top_k", sampling.top_k, "0 (all tokens) or a positive number", sampling.top_k >= 0),
        ("min_p", sampling.min_p, "a probability from 0 to 1", 0 <= sampling.min_p <= 1),
        ("presence_penalty", sampling.presence, "a finite number", math.isfinite(sampling.presence)),
        ("frequency_penalty", sampling.frequency, "a finite number", math.isfinite(sampling.frequency)),
        ("repetition_penalty", sampling.repetition, "a positive number", 0 < sampling.repetition < math.inf),
    ):
        if not good:
            raise Cannot(f"{name} is {value}; expected {expected}", name)
    for token, added in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise Cannot(f"logit_bias names the token {token}; the base has tokens 0 to {vocabulary - 1}", "logit_bias")
        if math.isnan(added) or added == math.inf:
            raise Cannot(f"logit_bias of the token {token} is {added}; expected a number", "logit_bias")
