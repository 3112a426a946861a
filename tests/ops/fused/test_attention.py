"""Causal attention with a backward of its own, against the plain lines, torch's own node and float64 maths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against import assert_as_exact, gradients, kept, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.ops.fused import attention
from lorakit.ops.fused.attention import BLOCK, BLOCKWISE_MAX_LENGTH, causal_attention, reference


def inputs(
    rows: int, length: int, heads: int, shared: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v; `shared`: queries to a key."""
    kv = (rows, heads // shared, length, size)
    made = [randn(rows, heads, length, size, seed=1, dtype=dtype), *(randn(*kv, seed=s, dtype=dtype) for s in (2, 3))]
    return [t.requires_grad_() for t in made]


def widened(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def torchs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As transformers calls it, with torch's own backward."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(2, 9),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]),
    size=st.integers(1, 8),
    scale=st.floats(0.05, 2),
)
def test_values_and_gradients_are_those_of_the_plain_lines(rows, length, heads, size, scale):
    tensors = inputs(rows, length, *heads, size)
    before = [t.detach().clone() for t in tensors]
    found, expected = causal_attention(*tensors, scale), reference(*tensors, scale)
    for a, e in zip([found, *gradients(found, tensors)], [expected, *gradients(expected, tensors)], strict=True):
        torch.testing.assert_close(a, e)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_gradcheck_with_the_kernels_backward(shared):
    assert gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.6), inputs(2, 4, 4, shared, 4))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("length", [3, 7, 8])
def test_gradcheck_with_the_backward_in_blocks(monkeypatch, shared, length):
    monkeypatch.setattr(attention, "_kernel_backward", attention._blockwise_backward)  # float64 takes the kernel's
    monkeypatch.setattr(attention, "BLOCK", 3)
    assert gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.6), inputs(2, length, 2, shared, 2))


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("shared", [1, 3])
def test_in_float64_both_backwards_give_the_plain_lines_gradients(monkeypatch, length, shared):
    qkv = inputs(2, length, 6, shared, 8)
    expected = gradients(reference(*qkv, 0.4), qkv)
    for backward in (attention._kernel_backward, attention._blockwise_backward):
        monkeypatch.setattr(attention, "_kernel_backward", backward)
        for a, e in zip(gradients(causal_attention(*qkv, 0.4), qkv), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [17, 2 * BLOCK + 30, BLOCKWISE_MAX_LENGTH + 1])
@pytest.mark.parametrize("shared", [1, 2])
def test_it_has_torchs_bits_and_gradients_as_near_to_float64_maths(dtype, length, shared):
    qkv = inputs(1, length, 2, shared, 16, dtype)
    found, plain = causal_attention(*qkv, 0.37), torchs(*qkv, 0.37)
    assert torch.equal(found, plain)
    wide = widened(*qkv)
    exact = reference(*wide, 0.37)
    assert [g.dtype for g in gradients(found, qkv)] == [dtype] * 3
    for a, p, e in zip(gradients(found, qkv), gradients(plain, qkv), gradients(exact, wide), strict=True):
        assert_as_exact([a], [p], [e], factor=1.5)


@pytest.mark.parametrize(
    "dtype, length", [(torch.bfloat16, 20), (torch.float16, 20), (torch.float32, 20), (torch.bfloat16, None)], ids=str
)
def test_short_rows_in_16_bits_take_the_backward_in_blocks(monkeypatch, dtype, length):
    taken = []
    for name in ("_kernel_backward", "_blockwise_backward"):
        run = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, name=name, run=run: taken.append(name) or run(*args))
    qkv = inputs(1, length or BLOCKWISE_MAX_LENGTH + 1, 1, 1, 4, dtype)
    causal_attention(*qkv, 0.5).sum().backward()
    assert taken == ["_blockwise_backward" if dtype != torch.float32 and length else "_kernel_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharp_and_flat_attention_are_nearly_as_exact_as_the_kernel(dtype):
    for size in (0.01, 12.0):
        qkv = inputs(1, BLOCK + 9, 2, 1, 16, dtype)
        qkv = [(t.detach() * s).requires_grad_() for t, s in zip(qkv, (size, 1.0, 1.0), strict=True)]
        wide = widened(*qkv)
        exact = gradients(reference(*wide, 0.37), wide)
        found, kernels, plain = (gradients(f(*qkv, 0.37), qkv) for f in (causal_attention, torchs, reference))
        for a, k, p, e in zip(found, kernels, plain, exact, strict=True):
            # of the kernel, which rounds dS once less: 1.5 for q and k, 1.0 for v
            assert_as_exact([a], [k], [e], factor=1.75)
            assert_as_exact([a], [p], [e], factor=1.25)


def test_later_tokens_change_nothing_earlier_in_values_or_gradients():
    for dtype in (torch.float64, torch.bfloat16):
        qkv = inputs(1, BLOCK + 20, 2, 1, 8, dtype)
        g = randn(*qkv[0].shape, seed=9, dtype=dtype)
        g[:, :, BLOCK + 5 :] = 0  # a loss of the first tokens only
        for d in torch.autograd.grad(causal_attention(*qkv, 0.3), qkv, g):
            assert not d[:, :, BLOCK + 5 :].any()
            assert d[:, :, : BLOCK + 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections_as_views_and_gradients_as_views_are_fine(dtype):
    """q, k, v cut from one tensor and turned, as models do; the gradient expanded from one number."""
    whole = randn(2, 7, 4, 3 * 8, dtype=dtype).requires_grad_()
    found, plain = (f(*(t.transpose(1, 2) for t in whole.split(8, -1)), 0.3) for f in (causal_attention, torchs))
    tolerance = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), whole)[0] for o in (found, plain)), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_shared_keys_once_and_no_probabilities(dtype):
    qkv = inputs(2, 16, 4, 2, 8, dtype)
    # Besides q, k and v: the output and the kernel's log-sum-exp.
    assert kept(lambda: causal_attention(*qkv, 0.3), qkv) == sorted(
        [(dtype, (2, 4, 16, 8)), (torch.float32, (2, 4, 16))], key=str
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(dtype):
    qkv = inputs(2, 9, 4, 2, 8, dtype)
    found = causal_attention(*qkv, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(found, qkv), gradients(found, qkv), strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(1, 3, 2, 1, 4)
    (first,) = torch.autograd.grad(causal_attention(q, k, v, 0.3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
