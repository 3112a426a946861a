"""Tensors without numbers: everything but the numbers is as with real ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorakit.plan.weightless import LARGEST_REAL, Shapes, Weightless


def pair(*size, dtype=torch.float32):
    return torch.randn(size).to(dtype), Weightless(torch.empty(size, dtype=dtype, device="meta"))


OPERATIONS = {
    "product": lambda x: x @ x.mT,
    "of another type": lambda x: x.to(torch.bfloat16).float(),
    "whole number": lambda x: x * 2,
    "split": lambda x: x.split(3, dim=1)[1],
    "permuted": lambda x: x.permute(2, 0, 1).contiguous(),
    "norm": lambda x: F.layer_norm(x, (8,)),
    "softmax": lambda x: x.softmax(-1),
    "indexed": lambda x: x[torch.tensor([True, False]), :, torch.tensor([3])],
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "loss": lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(14, dtype=torch.long), reduction="none"),
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "bits": lambda x: x.view(torch.int32),
    "dropout": lambda x: F.dropout(x, 0.1),
    "compared": lambda x: (x > 0).any(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_size_strides_and_type_of_real_ones_the_first_and_the_second_time(name):
    real, weightless = pair(2, 7, 8)
    expected = OPERATIONS[name](real)
    for _ in range(2):  # the second one is looked up
        with Shapes():
            made = OPERATIONS[name](weightless)
        assert isinstance(made, Weightless)
        assert (made.shape, made.stride(), made.dtype, made.device) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
            expected.device,
        )


def test_gradients_flow_and_have_the_parameters_shape():
    W = torch.nn.Parameter(pair(4, 8)[1])
    with Shapes():
        (pair(3, 8)[1] @ W.mT).sum().backward()
    assert isinstance(W.grad, Weightless)
    assert W.grad.shape == (4, 8)


def test_views_share_their_storage_and_results_in_place_are_the_same_object():
    _, x = pair(4, 6)
    with Shapes():
        for _ in range(2):
            part, other = x.view(24)[3:], x + 1
            assert part.meta.untyped_storage()._cdata == x.meta.untyped_storage()._cdata
            assert part.storage_offset() == 3
            assert other.meta.untyped_storage()._cdata != x.meta.untyped_storage()._cdata
            assert x.mul_(2) is x


def test_a_look_up_tells_one_from_one_point_nought():
    x = Weightless(torch.empty(3, dtype=torch.long, device="meta"))
    with Shapes():
        assert [(x * factor).dtype for factor in (1, 1.0, True)] == [torch.long, torch.float32, torch.long]


def test_numbers_cannot_be_asked_for():
    _, x = pair(3)
    with Shapes(), pytest.raises(RuntimeError):
        x.sum().item()


def test_what_weights_have_no_part_in_is_real_while_it_is_small():
    with Shapes():
        assert type(torch.arange(8)) is torch.Tensor
        assert torch.ones(3, device="meta").sum() == 3
        assert isinstance(torch.empty(LARGEST_REAL), Weightless)
