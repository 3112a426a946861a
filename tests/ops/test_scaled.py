"""`scaled` is diag(b) B diag(d), in values and gradients, and keeps no product for backward."""

from __future__ import annotations

import torch

from lorakit.ops.scaled import reference, scaled


def given(dtype=torch.float64):
    torch.manual_seed(0)
    B, b, d = torch.randn(7, 4, dtype=dtype), torch.randn(7, dtype=dtype), torch.randn(4, dtype=dtype)
    return B, b.requires_grad_(), d.requires_grad_()


def test_it_is_the_product_of_the_three():
    B, b, d = given()
    wanted = torch.diag(b) @ B @ torch.diag(d)
    torch.testing.assert_close(scaled(B, b, d), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference(B, b, d), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(scaled(B, b, d), reference(B, b, d))
    assert torch.autograd.gradcheck(lambda b, d: scaled(B, b, d), (b, d))
    one = b.detach()
    assert torch.autograd.gradcheck(lambda d: scaled(B, one, d), (d,))


def test_a_wide_vector_around_a_narrow_matrix_keeps_its_gradient_wide():
    B, b, d = given(torch.float32)
    wide = b.detach().double().requires_grad_()
    scaled(B, wide, d).sum().backward()
    assert (wide.grad.dtype, d.grad.dtype) == (torch.float64, torch.float32)


def test_it_keeps_its_inputs_alone():
    B, b, d = given()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        scaled(B, b, d)
    assert set(kept) == {t.data_ptr() for t in (B, b, d)}
