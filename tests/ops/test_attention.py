"""Causal attention with rotary positions as one node, against the plain lines, torch's own node and float64 maths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against import assert_as_exact, gradients, kept, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops import attention
from lorakit.ops.attention import BLOCK, LONGEST, reference, rope, rope_attention, rope_backward


def inputs(rows: int, length: int, heads: int, shared: int, size: int, dtype: torch.dtype = torch.float64, packed: bool = False):
    """q, k, v, cos, sin; `shared`: queries to a key. `packed`: positions of each row's own."""
    q = randn(rows, length, heads, size, seed=1, dtype=dtype).requires_grad_()
    k, v = (randn(rows, length, heads // shared, size, seed=s, dtype=dtype).requires_grad_() for s in (2, 3))
    angles = randn(rows if packed else 1, length, 1, size // 2, seed=4).repeat(1, 1, 1, 2)
    return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype)


def widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def torchs(q, k, v, cos, sin, scale: float):
    """As transformers writes it, with torch's own backward."""
    q, k, v = (t.transpose(1, 2) for t in (rotated(q, cos, sin), rotated(k, cos, sin), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def rotated(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rope_has_the_bits_of_the_plain_line_and_its_gradient_is_right(dtype):
    q, _, _, cos, sin = inputs(2, 5, 3, 1, 6, dtype, packed=True)
    assert torch.equal(rope(q.detach(), cos, sin), rotated(q, cos, sin))
    g = randn(*q.shape, seed=8, dtype=dtype)
    (expected,) = torch.autograd.grad(rotated(q, cos, sin), q, g)
    one = torch.finfo(dtype).eps
    torch.testing.assert_close(rope_backward(g, cos, sin), expected, atol=4 * one, rtol=4 * one)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(2, 9), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]), half=st.integers(1, 4),
    packed=st.booleans(), scale=st.floats(0.05, 2),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_plain_lines(rows, length, heads, half, packed, scale):
    tensors = inputs(rows, length, *heads, 2 * half, packed=packed)
    before = [t.detach().clone() for t in tensors]
    found, expected = rope_attention(*tensors, scale), reference(*tensors, scale)
    for a, e in zip([found, *gradients(found, tensors[:3])], [expected, *gradients(expected, tensors[:3])], strict=True):
        torch.testing.assert_close(a, e)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_gradcheck_with_the_kernels_backward(shared):
    *qkv, cos, sin = inputs(2, 4, 4, shared, 4)
    assert gradcheck(lambda q, k, v: rope_attention(q, k, v, cos, sin, 0.6), qkv)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("length", [3, 7, 8])
def test_gradcheck_with_the_backward_in_blocks(monkeypatch, shared, length):
    monkeypatch.setattr(attention, "_kernel_backward", attention._blockwise_backward)  # float64 takes the kernel's
    monkeypatch.setattr(attention, "BLOCK", 3)
    *qkv, cos, sin = inputs(2, length, 2, shared, 2)
    assert gradcheck(lambda q, k, v: rope_attention(q, k, v, cos, sin, 0.6), qkv)


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("shared", [1, 3])
def test_in_float64_both_backwards_give_the_plain_lines_gradients(length, shared):
    q, k, v, cos, sin = inputs(2, length, 6, shared, 8)
    expected = gradients(reference(q, k, v, cos, sin, 0.4), [q, k, v])
    with torch.no_grad():
        q2, k2, v2 = rope(q, cos, sin), attention._spread(rope(k, cos, sin), q), attention._spread(v, q)
    heads = [t.detach().transpose(1, 2) for t in (q2, k2, v2)]
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, attn_mask=None, scale=0.4)
    g = randn(*q.shape, seed=9)
    for made in (attention._blockwise_backward, attention._kernel_backward):
        dq, dk, dv = made(g, q2, k2, v2.detach(), out.transpose(1, 2), log_sum, 0.4)
        dk, dv = (t.unflatten(2, (k.shape[2], -1)).sum(3) for t in (dk, dv))
        for a, e in zip((rope_backward(dq, cos, sin), rope_backward(dk, cos, sin), dv), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [17, 2 * BLOCK + 30, LONGEST + 1])
@pytest.mark.parametrize("shared", [1, 2])
def test_it_has_torchs_bits_and_gradients_as_near_to_float64_maths(dtype, length, shared):
    *qkv, cos, sin = inputs(1, length, 2, shared, 16, dtype)
    found, plain = rope_attention(*qkv, cos, sin, 0.37), torchs(*qkv, cos, sin, 0.37)
    assert torch.equal(found, plain)
    wide = widened(*qkv)
    exact = reference(*wide, cos.double(), sin.double(), 0.37)
    assert [g.dtype for g in gradients(found, qkv)] == [dtype] * 3
    for a, p, e in zip(gradients(found, qkv), gradients(plain, qkv), gradients(exact, wide), strict=True):
        assert_as_exact([a], [p], [e], factor=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharp_and_flat_attention_are_as_exact(dtype):
    for size in (0.01, 12.0):
        *qkv, cos, sin = inputs(1, BLOCK + 9, 2, 1, 16, dtype)
        qkv = [(t.detach() * s).requires_grad_() for t, s in zip(qkv, (size, 1.0, 1.0), strict=True)]
        wide = widened(*qkv)
        exact = gradients(reference(*wide, cos.double(), sin.double(), 0.37), wide)
        found, plain = (gradients(f(*qkv, cos, sin, 0.37), qkv) for f in (rope_attention, torchs))
        for a, p, e in zip(found, plain, exact, strict=True):
            assert_as_exact([a], [p], [e])


def test_later_tokens_change_nothing_earlier_in_values_or_gradients():
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v, cos, sin = inputs(1, BLOCK + 20, 2, 1, 8, dtype)
        g = randn(*q.shape, seed=9, dtype=dtype)
        g[:, BLOCK + 5 :] = 0  # a loss of the first tokens only
        for d in torch.autograd.grad(rope_attention(q, k, v, cos, sin, 0.3), [q, k, v], g):
            assert not d[:, BLOCK + 5 :].any()
            assert d[:, : BLOCK + 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections_as_views_and_gradients_as_views_are_fine(dtype):
    """q, k, v cut from one tensor; the gradient expanded from one number."""
    whole = randn(2, 7, 4, 3 * 8, dtype=dtype).requires_grad_()
    _, _, _, cos, sin = inputs(2, 7, 4, 1, 8, dtype)
    found, plain = ((f(*whole.split(8, -1), cos, sin, 0.3)) for f in (rope_attention, torchs))
    tolerance = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), whole)[0] for o in (found, plain)), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_shared_keys_once_and_no_probabilities(dtype):
    *qkv, cos, sin = inputs(2, 16, 4, 2, 8, dtype)
    q, kv = (2, 16, 4, 8), (2, 16, 2, 8)
    # rope(q), rope(k), v, the output and the kernel's log-sum-exp
    expected = [(dtype, q), (dtype, kv), (dtype, kv), (dtype, q), (torch.float32, (2, 4, 16))]
    assert kept(lambda: rope_attention(*qkv, cos, sin, 0.3), [cos, sin]) == sorted(expected, key=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(dtype):
    *qkv, cos, sin = inputs(2, 9, 4, 2, 8, dtype)
    found = rope_attention(*qkv, cos, sin, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(found, qkv), gradients(found, qkv), strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v, cos, sin = inputs(1, 3, 2, 1, 4)
    (first,) = torch.autograd.grad(rope_attention(q, k, v, cos, sin, 0.3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
