"""int8 tensors are those of bitsandbytes to the bit, and mean the same."""

from __future__ import annotations

import pytest
import quantized
import torch

from lorakit.errors import LorakitError
from lorakit.ops.quantized import int8


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(48, 40, generator=torch.Generator().manual_seed(1)).mul(0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_of_a_saved_module(dtype):
    expected = quantized.linear8(weight(dtype)).state_dict()
    tensors = int8.quantized(weight(dtype))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_dequantized_weight_is_that_of_bitsandbytes():
    tensors = int8.quantized(weight())
    theirs = quantized.library().functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    assert torch.equal(int8.dequantized(tensors), theirs)
    torch.testing.assert_close(int8.dequantized(tensors).double(), quantized.int8_by_hand(weight()), atol=1e-7, rtol=0)


def test_a_row_of_zeros_stays_zero():
    W = weight()
    W[3] = 0
    assert not int8.dequantized(int8.quantized(W))[3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_float16_cannot_hold_is_refused(bad):
    W = weight()
    W[0, 0] = bad
    with pytest.raises(LorakitError, match="above 65,504"):
        int8.quantized(W)


def test_scales_of_another_size_are_refused():
    tensors = int8.quantized(weight())
    with pytest.raises(LorakitError, match="has 47 scales"):
        int8.dequantized({**tensors, "SCB": tensors["SCB"][1:]})
