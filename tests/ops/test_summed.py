"""A small frozen weight and its update as one weight, against float64 maths; and when it is chosen."""

from __future__ import annotations

import pytest
import torch
from against import randn

from lorakit.ops import summed
from lorakit.ops.summed import reference, summed_weight

SHAPES = {"linear": ((6, 5), (3, 5), (6, 3)), "conv": ((6, 5, 3, 2), (3, 5, 3, 2), (6, 3, 1, 1))}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_sum_and_its_gradients_are_the_equations(kind, layout):
    W, A, B = (randn(*shape, seed=i) for i, shape in enumerate(SHAPES[kind]))
    if W.dim() == 4:
        W = W.contiguous(memory_format=layout)
    A.requires_grad_(), B.requires_grad_()
    found = reference(W, A, B, 0.7)
    expected = W + 0.7 * torch.einsum("or,r...->o...", B.flatten(1), A)
    torch.testing.assert_close(found, expected)
    assert found.stride() == W.stride()
    weights = randn(*W.shape, seed=9)
    for a, e in zip(
        torch.autograd.grad((found * weights).sum(), [A, B]),
        torch.autograd.grad((expected * weights).sum(), [A, B]),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_a_zero_update_leaves_every_bit():
    W = randn(6, 5, dtype=torch.float32)
    assert torch.equal(reference(W, randn(3, 5, dtype=torch.float32), torch.zeros(6, 3), 2.0), W)


def test_it_is_refused_for_16_bits_mixed_dtypes_large_weights_few_rows_and_other_shapes():
    W, A, B = (randn(*shape, dtype=torch.float32) for shape in ((16, 16), (4, 16), (16, 4)))
    x = randn(64, 16, dtype=torch.float32)

    def summed_of(x=x, W=W, A=A, B=B):
        return summed_weight(x, 16, W, A, B, 1.0)

    assert summed_of() is not None
    assert summed_of(x=x[:31]) is None, "the sum is more than twice the thin product"
    assert summed_of(*(t.bfloat16() for t in (x, W, A, B))) is None
    assert summed_of(A=A.double()) is None
    assert summed_of(x=x.double()) is None
    side = int(summed.LARGEST**0.5) + 1
    large = [x.new_empty(shape) for shape in ((10_000, side), (side, side), (4, side), (side, 4))]
    assert summed_weight(large[0], side, *large[1:], 1.0) is None
    conv = randn(6, 5, 3, 3, dtype=torch.float32)
    grouped = randn(4, 10, 3, 3, dtype=torch.float32), randn(6, 2, 1, 1, dtype=torch.float32)  # PEFT's form
    assert summed_weight(randn(64, 10, 8, 8, dtype=torch.float32), 10, conv, *grouped, 1.0) is None
