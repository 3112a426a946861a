"""The moving average of the trained parameters, against the recursion in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.train.ema import Ema


def test_the_average_is_the_recursion_with_a_decay_that_grows_to_its_value():
    parameter = nn.Parameter(torch.zeros(3))
    ema, expected = Ema(0.8, {"a": parameter}), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 60):
        parameter.data = torch.randn(3, generator=torch.Generator().manual_seed(step))
        ema.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    torch.testing.assert_close(ema.values["a"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_parameters_are_the_averages_inside_and_bit_for_bit_their_own_after_an_error_too():
    parameter = nn.Parameter(torch.randn(4))
    ema, before = Ema(0.9, {"a": parameter}), parameter.detach().clone()
    ema.load({"a": torch.full((4,), 7.0)})

    def interrupted():
        with ema.in_use():
            assert parameter.tolist() == [7.0] * 4
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(parameter, before)
