"""NF4 and FP4 tensors are those of bitsandbytes to the bit, and mean the same."""

from __future__ import annotations

import json

import pytest
import quantized
import torch

from lorakit.errors import LorakitError
from lorakit.ops.quantized import blockwise
from lorakit.ops.quantized.blockwise import STATE, Blockwise

SHAPES = [(64, 64), (40, 24), (128, 192), (3, 5), (300, 256)]  # whole blocks, a last shorter one, an odd number
KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]


def library():
    return quantized.library().functional


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).mul(0.05).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind,double", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_bitsandbytes(shape, kind, double, dtype):
    W = weight(shape, dtype)
    packed, state = library().quantize_4bit(W.clone(), compress_statistics=double, quant_type=kind)
    expected = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    tensors = blockwise.quantized(W, Blockwise(kind, double, dtype=dtype))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith(STATE):
            assert json.loads(bytes(tensors[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert tensors[name].dtype == tensor.dtype, name
            if not (double and name == "weight.absmax"):
                assert torch.equal(tensors[name], tensor), name
    if double:
        check_scales(W, tensors, state)


def check_scales(W, tensors, state):
    """The library looks a scale's code up in a table of 65,536 values, and misses the nearest code close to a tie."""
    ours, theirs = tensors["weight.absmax"], state.absmax
    absmax = torch.stack([block.abs().max() for block in W.float().flatten().split(64)])
    outer = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
    apart, theirs_apart = (
        (absmax - state.offset - state.state2.code[codes.long()] * outer).abs() for codes in (ours, theirs)
    )
    assert bool((apart <= theirs_apart + 1e-9).all())
    assert bool((theirs_apart - apart <= outer / 2**15).all())


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (300, 256)])  # see `quantized.llama` for other sizes
@pytest.mark.parametrize("kind,double", KINDS)
def test_dequantized_weight_is_that_of_bitsandbytes(shape, kind, double):
    packed, state = library().quantize_4bit(weight(shape), compress_statistics=double, quant_type=kind)
    tensors = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    assert torch.equal(blockwise.dequantized(tensors), library().dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind,double", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_element_is_off_by_at_most_half_the_widest_step(shape, kind, double):
    W = weight(shape)
    back = blockwise.dequantized(blockwise.quantized(W, Blockwise(kind, double)))
    flat, n = W.flatten(), W.numel()
    absmax = torch.stack([block.abs().max() for block in flat.split(64)]).repeat_interleave(64)[:n]
    step = blockwise.codes(kind).sort().values.diff().max()
    slack = 0.02 * absmax.max() if double else 1e-7
    assert bool(((back - W).flatten().abs() <= absmax * step / 2 + slack).all())


def test_nf4_equals_the_papers_equation_in_float64():
    W = weight((128, 64))
    back = blockwise.dequantized(blockwise.quantized(W, Blockwise("nf4")))
    torch.testing.assert_close(back.double(), quantized.nf4_by_hand(W), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_block_sizes(blocksize):
    W = weight((128, 64))
    packed, state = library().quantize_4bit(W, blocksize=blocksize, quant_type="nf4")
    tensors = blockwise.quantized(W, Blockwise("nf4", blocksize=blocksize))
    assert torch.equal(tensors["weight"], packed)
    assert torch.equal(tensors["weight.absmax"], state.absmax)


def test_a_weight_of_zeros_stays_zero_and_one_that_is_not_finite_is_refused():
    for kind, double in KINDS:
        assert not blockwise.dequantized(blockwise.quantized(torch.zeros(4, 64), Blockwise(kind, double))).any()
    with pytest.raises(LorakitError, match="NaN or infinite"):
        blockwise.quantized(torch.tensor([[1.0, float("nan")]]))


def test_padding_the_state_changes_nothing():
    W, how = weight((64, 64)), Blockwise("nf4", True)
    indices, absmax = blockwise.indexed(W, how)
    padded = blockwise.packed_tensors(indices, absmax, (64, 64), how, 300)
    assert padded[STATE + "nf4"].numel() == 300
    assert torch.equal(blockwise.dequantized(padded), blockwise.dequantized(blockwise.quantized(W, how)))
    state = library().QuantState.from_dict(
        {n.removeprefix("weight."): t for n, t in padded.items() if n != "weight"}, torch.device("cpu")
    )
    assert torch.equal(library().dequantize_4bit(indices, state), blockwise.dequantized(padded).bfloat16())


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda t: t.pop(STATE + "nf4"), "missing or damaged"),
        (lambda t: t.update({STATE + "nf4": torch.tensor([1, 2], dtype=torch.uint8)}), "missing or damaged"),
        (lambda t: t.update({"weight": t["weight"][:-1]}), "expected 2,048 and 64"),
        (lambda t: t.update({"weight.absmax": t["weight.absmax"][:-1]}), "63 scales"),
    ],
)
def test_damaged_tensors_are_refused(change, said):
    tensors = blockwise.quantized(weight((64, 64)))
    change(tensors)
    with pytest.raises(LorakitError, match=said):
        blockwise.dequantized(tensors)
