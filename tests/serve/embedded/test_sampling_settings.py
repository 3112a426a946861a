"""Sampling settings out of range are refused by name, before they can break a batch."""

from __future__ import annotations

import math

import pytest

from lorakit.serve.embedded.sampling_settings import check_sampling
from lorakit.serve.engine import Sampling
from lorakit.serve.errors import Cannot


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": -0.5}, "min_p"),
        ({"presence": math.nan}, "presence_penalty"),
        ({"frequency": math.inf}, "frequency_penalty"),
        ({"repetition": 0.0}, "repetition_penalty"),
        ({"logit_bias": ((3, 1.0), (300, 1.0))}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, what):
    with pytest.raises(Cannot, match=what) as refused:
        check_sampling(Sampling(max_tokens=1, **settings), 300)
    assert refused.value.what == what


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0, "top_p": 0.0, "top_k": 10**9, "min_p": 1.0},
        {"logit_bias": ((0, -math.inf), (299, 100.0)), "presence": -2.0, "repetition": 0.5},
    ],
)
def test_settings_at_the_ends_of_their_ranges_are_taken(settings):
    check_sampling(Sampling(max_tokens=1, **settings), 300)
