"""Norms of rows by factoring, against the norms of the sum in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops import row_norms as module
from lorakit.ops.row_norms import reference, row_norms, row_squares


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[False, True], ids=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param:
        whole = module.row_blocks
        monkeypatch.setattr(module, "row_blocks", lambda shape: whole(shape, most=64 * 7))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 0.01, 1.0, 10.0])
def test_they_are_those_of_the_sum_in_float64(size, dtype, transposed, blocks):
    W = (randn(64, 50) if transposed else randn(50, 64)).to(dtype)
    W = W.T if transposed else W
    A, B = randn(4, W.shape[1]), size * randn(W.shape[0], 4)
    exact = reference(W.double(), A.double(), B.double(), 1.5)
    found = row_norms(W, row_squares(W), A, B, 1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(row_squares(W), W.double().square().sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_rows_that_the_update_nearly_cancels_are_exact_too(left):
    """‖W‖² and the two other terms have no digit in common with what is left of them."""
    B, A = randn(20, 3), randn(3, 30)
    W = (left * randn(20, 30) - B @ A).clone()
    W[0] = randn(30)  # and one that is not
    exact = reference(W.double(), A.double(), B.double(), 1.0)
    torch.testing.assert_close(row_norms(W, row_squares(W), A, B, 1.0).double(), exact, rtol=1e-6, atol=0)


def test_a_row_of_zeros_has_the_norm_zero():
    W, A, B = torch.zeros(3, 5), randn(2, 5), torch.zeros(3, 2)
    assert torch.equal(row_norms(W, row_squares(W), A, B, 2.0), torch.zeros(3))


def test_a_model_without_values_has_norms_without_values():
    W, A, B = (torch.empty(*shape, device="meta") for shape in ((6, 5), (2, 5), (6, 2)))
    assert row_norms(W, row_squares(W), A, B, 2.0).shape == (6,)
