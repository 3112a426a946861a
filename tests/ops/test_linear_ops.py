"""The linear update's fast forms against the plain lines they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops.linear import add_low_rank, frozen_linear, reference


def tensors(shape: tuple[int, ...], size_out: int, rank: int, dtype=torch.float64, seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(s, generator=made, dtype=torch.float64) for s in (shape, (size_out, shape[-1]), (size_out,)))
    A, B = (
        torch.randn(rank, shape[-1], generator=made, dtype=torch.float64),
        torch.randn(size_out, rank, generator=made, dtype=torch.float64),
    )
    return [t.to(dtype) for t in (x, W, b, A, B)]


shapes = st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 6)).map(lambda s: (*s[0], s[1]))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, size_out=st.integers(1, 6), rank=st.integers(1, 7), scale=st.floats(-3, 3), with_bias=st.booleans())
def test_frozen_linear_equals_the_plain_line_in_values_and_gradients(shape, size_out, rank, scale, with_bias):
    x, W, b, A, B = tensors(shape, size_out, rank)
    bias = b if with_bias else None
    ours, theirs = ([t.clone().requires_grad_() for t in (x, A, B)] for _ in range(2))
    fast = frozen_linear(ours[0], W, bias, ours[1], ours[2], scale)
    plain = F.linear(theirs[0], W, bias) + reference(*theirs, scale)
    torch.testing.assert_close(fast, plain)
    weights = torch.randn(plain.shape, dtype=torch.float64)
    for a, e in zip(torch.autograd.grad((fast * weights).sum(), ours), torch.autograd.grad((plain * weights).sum(), theirs), strict=True):
        torch.testing.assert_close(a, e)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, size_out=st.integers(1, 6), rank=st.integers(1, 7), scale=st.floats(-3, 3), y_takes_gradients=st.booleans())
def test_add_low_rank_equals_the_plain_line_in_values_and_gradients(shape, size_out, rank, scale, y_takes_gradients):
    x, W, b, A, B = tensors(shape, size_out, rank)
    W.requires_grad_(y_takes_gradients)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, A, B)] for _ in range(2))
    fast = add_low_rank(F.linear(ours[0], W, b), *ours, scale)
    plain = F.linear(theirs[0], W, b) + reference(*theirs, scale)
    torch.testing.assert_close(fast, plain)
    wanted = ([*ours, W], [*theirs, W]) if y_takes_gradients else (ours, theirs)
    for a, e in zip(*(torch.autograd.grad(out.square().sum(), w) for out, w in zip((fast, plain), wanted, strict=True)), strict=True):
        torch.testing.assert_close(a, e)


SUBSETS = [s for s in itertools.product([False, True], repeat=3) if any(s)]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: "".join(n for n, on in zip("xAB", s, strict=True) if on))
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)], ids=str)
def test_gradients_are_right_for_every_subset_of_inputs_that_take_them(needs, shape):
    x, W, b, A, B = tensors(shape, 5, 2)
    wide = torch.cat([x, x], dim=-1).transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]  # not contiguous
    wide = wide.detach()
    assert wide.shape == x.shape
    for t, on in zip((wide, A, B), needs, strict=True):
        t.requires_grad_(on)
    assert gradcheck(lambda x, A, B: frozen_linear(x, W, b, A, B, 0.7), (wide, A, B))
    assert gradcheck(lambda x, A, B: add_low_rank(F.linear(x, W, b), x, A, B, 0.7), (wide, A, B))


def test_the_base_output_takes_its_gradient_through_the_update():
    x, W, b, A, B = tensors((3, 4), 5, 2)
    W.requires_grad_(), b.requires_grad_()
    assert gradcheck(lambda W, b: add_low_rank(F.linear(x, W, b), x, A, B, 0.7), (W, b))


@pytest.mark.parametrize("through", ["fused", "added"])
def test_bf16_activations_keep_fp32_factors_and_give_fp32_gradients(through):
    x, W, b, A, B = tensors((6, 8), 5, 2, torch.bfloat16)
    x.requires_grad_()
    A, B = A.float().requires_grad_(), B.float().requires_grad_()
    y = frozen_linear(x, W, b, A, B, 0.5) if through == "fused" else add_low_rank(F.linear(x, W, b), x, A, B, 0.5)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
    exact = F.linear(wide[0], W.double(), b.double()) + reference(*wide, 0.5)
    torch.testing.assert_close(y.double(), exact, atol=0.1, rtol=0.02)
    for ours, e in zip((x, A, B), torch.autograd.grad(exact.square().sum(), wide), strict=True):
        assert (ours.grad.double() - e).norm() / e.norm() < 0.02


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, W, b, A, B = tensors((3, 4), 5, 2)
    x.requires_grad_()
    (first,) = torch.autograd.grad(frozen_linear(x, W, b, A, B, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_backward_keeps_x_and_the_rank_wide_product_only():
    x, W, b, A, B = tensors((64, 32), 48, 2, torch.float32)
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (W, b, A, B)}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x, W, b, A, B, 1.0)
    assert sum(kept.values()) == x.nbytes + 64 * 2 * 4
