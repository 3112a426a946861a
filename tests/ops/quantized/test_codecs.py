"""The formats of GPTQ and AWQ against codes picked out of their bits one by one."""

from __future__ import annotations

import packed_checkpoints as checkpoints
import pytest
import torch
from torch import Tensor
from transformers.utils.quantization_config import AwqFormat

from lorakit.errors import LorakitError
from lorakit.ops.quantized import awq, gptq
from lorakit.ops.quantized.int32 import pack, unpack

FORMATS = {
    f"gptq {bits} bits, {name}": checkpoints.gptq_config(bits=bits, **settings)
    for bits in gptq.BITS
    for name, settings in {
        "symmetric": {},
        "asymmetric": {"sym": False},
        "activation order": {"desc_act": True, "sym": False},
        "v2": {"checkpoint_format": "gptq_v2", "sym": False},
        "v2 by its newer name": {"checkpoint_format": None, "format": "GPTQ_v2", "sym": False},
        "one group": {"group_size": -1},
    }.items()
} | {
    "awq": checkpoints.awq_config(),
    "awq, one group": checkpoints.awq_config(group_size=-1),
    "awq, older names": {"quant_method": "awq", "w_bit": 4, "bits": 4, "q_group_size": 64, "group_size": 64},
}


def weight(seed: int = 0, size_out: int = 32, size_in: int = 128) -> Tensor:
    return torch.randn(size_out, size_in, generator=torch.Generator().manual_seed(seed)) * 0.05


def codec_of(how):
    codec = awq if how["quant_method"] == "awq" else gptq
    return codec, codec.Settings.of(how)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_packed_integers_are_a_string_of_bits(bits):
    codes = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (96 * bits // 32, 5)
    for column in range(5):
        string = sum(int(code) << bits * i for i, code in enumerate(codes[:, column]))
        assert sum((w & 0xFFFFFFFF) << 32 * i for i, w in enumerate(words[:, column].tolist())) == string
    assert torch.equal(unpack(words, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_weight_is_what_the_bits_say_and_near_the_weight(name):
    how, W = FORMATS[name], weight()
    codec, settings = codec_of(how)
    tensors = checkpoints.packed(W, how)
    assert {n: t.dtype for n, t in tensors.items()} == {
        n: torch.float16 if n == "scales" else torch.int32 for n in codec.NAMES
    }
    dense = codec.dequantized(tensors, settings)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), checkpoints.by_hand(tensors, how), atol=1e-7, rtol=1e-6)
    step = tensors["scales"].float().T[:, codec.groups_of(tensors, settings)]
    assert ((dense - W).abs() <= 0.501 * step + 1e-3 * W.abs().max()).all()


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_what_was_dequantized_changes_nothing(name):
    how = FORMATS[name]
    codec, settings = codec_of(how)
    first = checkpoints.packed(weight(), how)
    dense = codec.dequantized(first, settings)
    again = checkpoints.packed(dense, how)
    difference = (codec.dequantized(again, settings) - dense).abs().max()
    assert difference <= 0.6 * first["scales"].max()  # a grid that reaches less far may move by half a step


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_zero_and_of_one_sign_are_packed_exactly_enough(name):
    how = FORMATS[name]
    codec, settings = codec_of(how)
    assert not codec.dequantized(checkpoints.packed(torch.zeros(32, 128), how), settings).any()
    for sign in (1, -1):
        W = sign * (weight().abs() + 0.01)
        tensors = checkpoints.packed(W, how)
        step = tensors["scales"].float().T[:, codec.groups_of(tensors, settings)]
        assert ((codec.dequantized(tensors, settings) - W).abs() <= 0.501 * step + 1e-4).all()


def test_awq_puts_eight_outputs_into_a_word_in_its_own_order():
    tensors = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),  # nibbles, lowest first: 0 2 4 6 1 3 5 7
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert awq.dequantized(tensors, awq.Settings(-1)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_gptq_stores_zeros_less_one_in_its_first_format():
    tensors = {
        "qweight": torch.full((1, 8), 0x0A, dtype=torch.int32),
        "qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    first = gptq.dequantized(tensors, gptq.Settings(4, -1))
    second = gptq.dequantized(tensors, gptq.Settings(4, -1, plus_one=False))
    assert first[:, 0].tolist() == [10 - 8] * 8
    assert second[:, 0].tolist() == [10 - 7] * 8


@pytest.mark.parametrize(
    "how, message",
    [
        (checkpoints.gptq_config(bits=5), "GPTQ weights of 5 bits.*\n  expected 2, 3, 4 or 8"),
        (checkpoints.gptq_config(checkpoint_format="marlin"), "the format 'marlin'.*\n  expected gptq or gptq_v2"),
        (
            checkpoints.gptq_config(checkpoint_format=None, format="marlin"),
            r"the format 'marlin' \(quantization_config.format\).*\n  expected gptq or gptq_v2",
        ),
        (checkpoints.gptq_config(format="gptq_v2"), "two formats .*checkpoint_format is 'gptq', format is 'gptq_v2'"),
        (checkpoints.awq_config(bits=8), "AWQ weights of 8 bits.*\n  expected 4"),
        (checkpoints.gptq_config(bits=None), "quantization_config.bits is None\n  expected a whole number"),
        (checkpoints.gptq_config(bits="4"), "quantization_config.bits is '4'\n  expected a whole number"),
        (checkpoints.gptq_config(group_size="128"), "quantization_config.group_size is '128'\n  expected a whole"),
        (checkpoints.awq_config(group_size="128"), "quantization_config.group_size is '128'\n  expected a whole"),
        (checkpoints.awq_config(version="gemv_fast"), "the layout 'gemv_fast'.*\n  expected gemm"),
    ],
)
def test_other_layouts_are_refused(how, message):
    with pytest.raises(LorakitError, match=message):
        codec_of(how)


def test_settings_of_a_librarys_config_object_are_read():
    from transformers import AwqConfig, GPTQConfig

    assert awq.Settings.of(AwqConfig(group_size=64).to_dict()) == awq.Settings(64)
    assert awq.Settings.of({"format": AwqFormat.GEMM}) == awq.Settings(128)
    how = GPTQConfig(bits=4, format="gptq_v2").to_dict()
    assert gptq.Settings.of(how) == gptq.Settings(plus_one=False)


@pytest.mark.parametrize("how", [checkpoints.gptq_config(), checkpoints.awq_config()], ids=["gptq", "awq"])
@pytest.mark.parametrize("name", ["qzeros", "scales"])
def test_tensors_that_do_not_fit_together_are_named(how, name):
    codec, settings = codec_of(how)
    tensors = checkpoints.packed(weight(), how)
    tensors[name] = tensors[name][:, :-1]
    with pytest.raises(LorakitError, match=rf"{name} is \[4, \d+\], expected \[4, \d+\] beside a qweight"):
        codec.dequantized(tensors, settings)


def test_sizes_that_do_not_fill_words_are_refused():
    with pytest.raises(LorakitError, match="33 outputs of 4 bits"):
        gptq.quantized(weight(size_out=33), gptq.Settings())
    with pytest.raises(LorakitError, match="12 outputs of 4 bits"):
        awq.quantized(weight(size_out=12), awq.Settings())
