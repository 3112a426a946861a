"""RMSNorm as one node, against the plain lines and transformers' own."""

from __future__ import annotations

import importlib

import pytest
import torch
from against import DTYPES, assert_as_exact, gradients, kept, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops.fused.rms_norm import NormVariant, reference, rms_norm

EPS = 1e-5
VARIANTS = pytest.mark.parametrize("variant", NormVariant, ids=lambda variant: variant.name)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, weight: torch.dtype | None = None):
    return randn(*shape, dtype=dtype).requires_grad_(), 1 + 0.3 * randn(shape[-1], seed=1, dtype=weight or dtype)


def exact_of(x: torch.Tensor, weight: torch.Tensor, variant: NormVariant):
    wide = x.detach().double().requires_grad_()
    return reference(wide, weight.double(), EPS, variant), wide


shapes = st.tuples(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9)).map(lambda s: (*s[0], s[1]))
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])


@settings(max_examples=120, deadline=None)
@given(
    shape=shapes, dtype=st.sampled_from([torch.float64, *DTYPES]), layout=layouts, variant=st.sampled_from(NormVariant)
)
def test_values_have_the_plain_lines_bits_and_gradients_their_exactness(shape, dtype, layout, variant):
    x, weight = inputs(*shape, dtype=dtype)
    with torch.no_grad():
        if layout == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "strided":
            x = torch.stack([x, x], dim=-1)[..., 0]
        elif layout == "expanded" and len(shape) > 1:
            x = x[:1].expand(x.shape)
    x, before = x.detach().requires_grad_(), x.detach().clone()
    found, plain = rms_norm(x, weight, EPS, variant), reference(x, weight, EPS, variant)
    assert torch.equal(found, plain)
    exact, wide = exact_of(x, weight, variant)
    assert gradients(found, [x])[0].dtype == dtype
    # The gradient is a difference, of numbers as large as (o + w) / √(mean(x²) + ε).
    largest = (1 + variant.offset) * (wide.square().mean(-1) + EPS).rsqrt().amax().item() if x.numel() else 1.0
    close = {"atol": 16 * torch.finfo(dtype).eps * largest, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(gradients(found, [x])[0].double(), gradients(exact, [wide])[0], **close)
    assert torch.equal(x, before)


@VARIANTS
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 2, 3), (4,), (0, 4)], ids=str)
def test_gradcheck(shape, variant):
    x, weight = inputs(*shape)
    assert gradcheck(lambda x: rms_norm(x, weight, EPS, variant), (x,))


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [None, torch.float32], ids=["same type", "fp32 weight"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype, weight, size, variant):
    x, w = inputs(128, 64, dtype=dtype, weight=weight)
    x = (x.detach() * size).requires_grad_()
    exact, wide = exact_of(x, w, variant)
    found, plain = rms_norm(x, w, EPS, variant), reference(x, w, EPS, variant)
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)
    assert_as_exact(gradients(found, [x]), gradients(plain, [x]), gradients(exact, [wide]))


WRITTEN = {
    NormVariant.ROUNDED_FIRST: ("llama", "LlamaRMSNorm"),
    NormVariant.ROUNDED_LAST: ("olmo2", "Olmo2RMSNorm"),
    NormVariant.FROM_ONE: ("gemma", "GemmaRMSNorm"),
}


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_has_the_bits_of_transformers(dtype, variant):
    model, cls = WRITTEN[variant]
    x, weight = inputs(5, 7, 32, dtype=dtype)
    norm = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), cls)(32, EPS).to(dtype)
    norm.weight.data.copy_(weight)
    assert torch.equal(rms_norm(x, weight, EPS, variant), norm(x))


def test_the_forms_differ_in_16_bits():
    x, weight = inputs(5, 7, 32, dtype=torch.bfloat16)
    first, last, from_one = (rms_norm(x, weight, EPS, variant) for variant in NormVariant)
    assert not torch.equal(first, last)
    assert not torch.allclose(last, from_one)


@VARIANTS
def test_rows_of_zeros_stay_zero_and_have_a_finite_gradient(variant):
    x, weight = torch.zeros(3, 8, requires_grad=True), torch.ones(8)
    found = rms_norm(x, weight, EPS, variant)
    assert not found.any()
    torch.testing.assert_close(gradients(found, [x]), gradients(reference(x, weight, EPS, variant), [x]))


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_x_as_it_came_and_one_number_a_row(dtype, variant):
    x, weight = inputs(4, 16, 32, dtype=dtype)
    expected = sorted([(dtype, (4, 16, 32)), (torch.float32, (4, 16, 1))], key=str)
    assert kept(lambda: rms_norm(x, weight, EPS, variant), [weight]) == expected


@VARIANTS
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(variant):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, weight = inputs(5, 8, dtype=dtype)
        found = rms_norm(x, weight, EPS, variant)
        assert torch.equal(*(gradients(found, [x])[0] for _ in range(2)))


@VARIANTS
def test_the_output_may_be_changed_in_place(variant):
    x, weight = inputs(5, 8)
    found, plain = rms_norm(x, weight, EPS, variant).mul_(2).relu_(), (2 * reference(x, weight, EPS, variant)).relu()
    torch.testing.assert_close(gradients(found, [x]), gradients(plain, [x]))


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight = inputs(3, 4)
    (first,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
