"""`kronecker.apply` is the dense Kronecker product, in values and gradients, in whichever order it multiplies."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import kronecker

SHAPES = {  # (o1, i1), (o2, i2), rank
    "of full matrices": ((2, 3), (5, 4), None),
    "W1 first": ((2, 8), (9, 3), None),
    "W2 first": ((8, 2), (3, 9), None),
    "of a product": ((3, 2), (5, 4), 2),
}


@pytest.mark.parametrize("case", SHAPES)
def test_it_is_the_dense_product(case):
    (o1, i1), (o2, i2), rank = SHAPES[case]
    torch.manual_seed(0)
    first = torch.randn(o1, i1, dtype=torch.float64, requires_grad=True)
    shapes = [(o2, i2)] if rank is None else [(o2, rank), (rank, i2)]
    second = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    x = torch.randn(2, 3, i1 * i2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        kronecker.apply(x, first, second, 0.7), kronecker.reference(x, first, second, 0.7), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda x, first, *second: kronecker.apply(x, first, second, 0.7), (x, first, *second)
    )
