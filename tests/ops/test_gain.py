"""A factor for each output: the node against the equation, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops.gain import add_gain, excess, reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


# y0, h, bias: of each output; of each row of a batch; of a convolution's channels
SHAPES = [
    ((4, 3, 6), (6,), (6,)),
    ((4, 3, 6), (4, 1, 6), (6,)),
    ((2, 6, 5, 5), (6, 1, 1), (6, 1, 1)),
    ((6,), (6,), (6,)),
]


@pytest.mark.parametrize("own", [True, False], ids=["y is the base's output", "y has updates already"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape, h, bias", SHAPES)
def test_the_node_computes_the_equation_and_its_gradients(shape, h, bias, biased, own):
    y0, h, b = randn(*shape).requires_grad_(), randn(*h).requires_grad_(), randn(*bias) if biased else None
    y = None if own else randn(*shape, seed=1).requires_grad_()
    inputs = [t for t in (y, y0, h) if t is not None]

    def found(*_: Tensor) -> Tensor:
        return add_gain(y0 if y is None else y, y0, h, b)

    expected = (y0 if y is None else y) + h * (y0 - (0 if b is None else b))
    torch.testing.assert_close(found(), expected)
    assert torch.autograd.gradcheck(found, inputs)
    with torch.no_grad():
        assert torch.equal(found(), reference(y0 if y is None else y, y0, h, b))


def test_a_bias_that_is_trained_gets_its_gradient():
    y0, h, b = (randn(3, 6, seed=s)[0 if s else slice(None)].requires_grad_() for s in range(3))
    assert torch.autograd.gradcheck(lambda *_: add_gain(y0, y0, h, b), (y0, h, b))


def test_without_a_change_the_output_keeps_its_bits_also_in_16_bits():
    y = randn(4, 6).bfloat16()
    bias = randn(6).bfloat16()
    assert torch.equal(add_gain(y, y, torch.zeros(6), bias), y)


def test_a_small_gain_survives_16_bits():
    y = torch.full((1, 1), 256.0).bfloat16()
    gain = torch.tensor([1 + 2**-7 + 2**-9], dtype=torch.float32)  # 1 + 2**-7 in bfloat16: a fifth of it lost
    assert float(add_gain(y, y, excess(gain, 1.0))) == 258.0
    assert float(excess(gain, 0.5)) == 0.5 * (2**-7 + 2**-9)


def test_outputs_may_be_written_into_before_backward():
    y0, h = randn(4, 6).requires_grad_(), randn(6).requires_grad_()
    add_gain(y0 * 1, y0 * 1, h).mul_(2).sum().backward()
    torch.testing.assert_close(h.grad, 2 * y0.detach().sum(0))
