"""GGUF adapters, both ways. The `gguf` package's own reader and the rotary maths of llama.cpp are the judges."""

from __future__ import annotations

import random
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit import formats
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.errors import AdapterError
from lorakit.formats import gguf
from lorakit.formats.gguf_names import ARCHITECTURES, permute, tensor_names, unpermute
from lorakit.io.gguf_header import is_gguf

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
QWEN = LLAMA | {"model_type": "qwen3"}
LAYER = "model.layers.{}.{}".format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def factors(seed: int, inner=16, out=32, rank=3, alpha=6.0, dtype=torch.float32, **more) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inner, generator=g).to(dtype), torch.randn(out, rank, generator=g).to(dtype)
    return Factors(A, B, alpha, **more)


def adapter(made: dict[str, Factors], **more) -> Adapter:
    return Adapter(lk.LoraConfig(rank=3, alpha=6, targets=["q_proj"]), made, **more)


def whole(dtype=torch.float32, alpha: float = 6.0) -> Adapter:
    """One of every kind of linear of a llama, q and k of 4 and 2 heads, and the tokens."""
    shapes = {
        "self_attn.q_proj": (16, 32),
        "self_attn.k_proj": (16, 16),
        "self_attn.v_proj": (16, 16),
        "self_attn.o_proj": (32, 16),
    }
    shapes |= {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    made = {
        LAYER(n, m): factors(n * 10 + i, *s, alpha=alpha, dtype=dtype)
        for n in (0, 11)
        for i, (m, s) in enumerate(shapes.items())
    }
    made["lm_head"] = factors(98, 16, 40, alpha=alpha, dtype=dtype)
    made["model.embed_tokens"] = factors(99, 40, 16, alpha=alpha, dtype=dtype, kind="embedding")
    return adapter(made)


def re_read(path: Path) -> tuple[float, dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    return reader.fields["adapter.lora.alpha"].contents(), tensors


def same(a: Factors, b: Factors) -> None:
    assert a.A.dtype == b.A.dtype
    assert torch.equal(a.A, b.A)
    assert torch.equal(a.B, b.B)
    assert (a.alpha, a.kind, a.transposed, a.parts) == (b.alpha, b.kind, b.transposed, b.parts)


def test_the_header_is_what_llama_cpp_checks(tmp_path):
    path = gguf.write(whole(), tmp_path / "x.gguf", LLAMA)
    assert is_gguf(path)
    fields = GGUFReader(path).fields
    told = {
        key: fields[key].contents()
        for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    }
    assert told == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }


@pytest.mark.parametrize("base", [LLAMA, QWEN], ids=["llama, permuted", "qwen3, as they are"])
def test_the_gguf_package_reads_the_same_change_of_each_weight(base, tmp_path):
    value = whole()
    alpha, theirs = re_read(gguf.write(value, tmp_path / "x.gguf", base))
    assert len(theirs) == 2 * len(value.factors)
    for module, tensor in gguf.names_of(value, base).items():
        f, a, b = value.factors[module], theirs[f"{tensor}.lora_a"], theirs[f"{tensor}.lora_b"]
        if tensor == "token_embd.weight":  # llama.cpp: rows of a are the tokens
            assert (a.shape, b.shape) == ((40, 3), (16, 3))
            a = a.T
        full = alpha / a.shape[0] * b @ a
        ours = (f.scale * f.B.double() @ f.A.double()).numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.split(".")[-2]) if base is LLAMA else None
        if heads:  # llama.cpp's definition (LlamaModel.permute)
            ours = ours.reshape(heads, 2, ours.shape[0] // heads // 2, ours.shape[1]).swapaxes(1, 2).reshape(ours.shape)
        np.testing.assert_allclose(full, ours, atol=1e-12)
        np.testing.assert_array_equal(gguf.rows_of(module, (f.scale * f.B.double() @ f.A.double()).numpy(), base), ours)


def test_permuted_rows_under_llama_cpps_rotation_are_the_rotated_rows_permuted():
    """transformers rotates a head's halves, llama.cpp its neighbouring pairs; the permutation makes them one."""
    heads, size = 3, 8
    x = torch.randn(heads * size, 5, dtype=torch.float64)
    angle = torch.rand(size // 2, 1, dtype=torch.float64)
    first, second = x.reshape(heads, 2, size // 2, 5).unbind(1)
    halves = torch.stack(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 1
    ).reshape(x.shape)
    even, odd = permute(x, heads, "q").reshape(heads, size // 2, 2, 5).unbind(2)
    pairs = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], 2).reshape(
        x.shape
    )
    torch.testing.assert_close(pairs, permute(halves, heads, "q"))
    assert torch.equal(unpermute(permute(x, heads, "q"), heads, "q"), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [6.0, 0.1])
def test_what_is_written_is_read_back_bit_equal(dtype, alpha, tmp_path):
    value = whole(dtype, alpha)
    again = gguf.read(gguf.write(value, tmp_path / "x.gguf", LLAMA), LLAMA)
    assert set(again.factors) == set(value.factors)
    for module, f in value.factors.items():
        same(f, again.factors[module])


modules = st.builds(
    factors,
    st.integers(0, 99),
    rank=st.integers(1, 5),
    alpha=st.sampled_from([1.0, 2.0, 6.0, 0.3, 32.0]),
    rslora=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(modules, min_size=1, max_size=4))
def test_alphas_of_a_modules_own_and_rslora_are_in_the_factors(tmp_path_factory, made):
    value = adapter({LAYER(n, "self_attn.q_proj"): f for n, f in enumerate(made)})
    path = gguf.write(value, tmp_path_factory.mktemp("gguf") / "x.gguf", QWEN)
    alpha, theirs = re_read(path)
    again = gguf.read(path)
    for n, f in enumerate(made):
        a, b = (theirs[f"blk.{n}.attn_q.weight.lora_{h}"] for h in "ab")
        expected = (f.scale * f.B.double() @ f.A.double()).numpy()
        # of B and the file's alpha in float32
        rounding = 2**-22 * (f.scale * f.B.double().abs() @ f.A.double().abs()).numpy()
        assert (np.abs(alpha / a.shape[0] * b @ a - expected) <= rounding).all()
        g = again.factors[LAYER(n, "self_attn.q_proj")]
        assert (np.abs((g.scale * g.B.double() @ g.A.double()).numpy() - expected) <= rounding).all()


def test_a_gpt2_with_packed_parts_comes_back_as_it_was(tmp_path, tiny_gpt2):
    config = lk.LoraConfig(rank=3, targets=["c_attn", "c_fc", "c_proj"], packed={"c_attn": [True, False, True]})
    value = lk.capture(tiny.randomise_factors(lk.attach(tiny_gpt2, config)))
    again = gguf.read(gguf.write(value, tmp_path / "x.gguf", tiny_gpt2.config))
    assert dict(again.metadata) == dict(value.metadata)
    for module, f in value.factors.items():
        g = again.factors[module]
        assert (f.parts, f.transposed, f.rank) == (g.parts, g.transposed, g.rank)
        assert torch.equal(f.scale * f.B, g.scale * g.B), (
            "its rank in the file is that of all parts; the rest of alpha is in B"
        )
    ours = tiny.logits(tiny_gpt2)
    torch.testing.assert_close(tiny.logits(lk.attach(tiny.gpt2(), again)), ours, atol=1e-5, rtol=1e-5)


def test_the_base_may_be_a_folder_a_config_or_the_adapters_own(tmp_path, tiny_llama):
    tiny_llama.config.save_pretrained(tmp_path / "base")
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj", "k_proj"], base=str(tmp_path / "base")))
    value = lk.capture(tiny.randomise_factors(tiny_llama))
    files = [
        gguf.write(value, tmp_path / f"{n}.gguf", b) for n, b in enumerate([tmp_path / "base", tiny_llama.config, None])
    ]
    assert len({f.read_bytes() for f in files}) == 1
    again = gguf.read(files[0], tmp_path / "base")
    torch.testing.assert_close(
        tiny.logits(lk.attach(tiny.llama(), again)), tiny.logits(tiny_llama), atol=1e-5, rtol=1e-5
    )


def test_q8_0_is_read(tmp_path):
    writer = GGUFWriter(tmp_path / "q.gguf", "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8)
    wanted = {}
    for half, shape in (("a", (32, 64)), ("b", (64, 32))):
        data = quantize(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), GGMLQuantizationType.Q8_0)
        wanted[half] = dequantize(data, GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.0.ffn_up.weight.lora_{half}", data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    f = gguf.read(tmp_path / "q.gguf").factors[LAYER(0, "mlp.up_proj")]
    np.testing.assert_array_equal(f.A.numpy(), wanted["a"])
    np.testing.assert_array_equal(f.B.numpy(), wanted["b"])


def test_q8_0_is_written_where_rows_are_whole_blocks_and_f16_elsewhere(tmp_path):
    made = {
        LAYER(0, "mlp.up_proj"): factors(1, 64, 96, rank=32),
        LAYER(0, "mlp.down_proj"): factors(2, 96, 64, rank=3),
        LAYER(0, "mlp.gate_proj"): factors(3, 48, 96),
    }
    path = formats.save(adapter(made), tmp_path / "x.gguf", "gguf", dtype="q8_0", base=QWEN)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
    assert kinds == {
        "blk.0.ffn_up.weight.lora_a": "Q8_0",
        "blk.0.ffn_up.weight.lora_b": "Q8_0",
        "blk.0.ffn_down.weight.lora_a": "Q8_0",
        "blk.0.ffn_down.weight.lora_b": "F16",
        "blk.0.ffn_gate.weight.lora_a": "F16",
        "blk.0.ffn_gate.weight.lora_b": "F16",
    }
    again = gguf.read(path)
    for module, f in made.items():
        found = again.factors[module]
        assert found.alpha == f.alpha
        for ours, theirs in ((f.A, found.A), (f.B, found.B)):
            blocks = ours.shape[1] % 32 == 0
            # half a step of a block's largest / 127, with its scale in f16
            bound = (0.5 + 127 / 2048) / 127 if blocks else 1 / 2048
            assert 0 < (ours - theirs).abs().max() <= bound * ours.abs().max()


def test_q8_0_has_a_way_out_for_numbers_beyond_f16(tmp_path):
    f = factors(1, 64, 96)
    made = {LAYER(0, "mlp.up_proj"): Factors(f.A, f.B * 1e5, f.alpha)}
    path = gguf.write(adapter(made), tmp_path / "x.gguf", QWEN, "q8_0")
    assert {t.name[-6:]: t.tensor_type.name for t in GGUFReader(path).tensors} == {"lora_a": "Q8_0", "lora_b": "F32"}
    assert torch.equal(gguf.read(path).factors[LAYER(0, "mlp.up_proj")].B, made[LAYER(0, "mlp.up_proj")].B)


def test_q8_0_is_for_gguf_alone(tmp_path):
    with pytest.raises(AdapterError, match="q8_0 is a type of GGUF's tensors, which peft does not have"):
        formats.save(whole(), tmp_path / "x", "peft", dtype="q8_0")
    with pytest.raises(AdapterError, match="dtype is 'q4_0'; expected a torch dtype"):
        formats.save(whole(), tmp_path / "x.gguf", "gguf", dtype="q4_0", base=LLAMA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_linear_of_a_real_model_has_its_tensor(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **sizes, vocab_size=48, pad_token_id=0)
        )
    real = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = tensor_names(ARCHITECTURES[model_type], 2)
    tokens = {n for n, m in model.named_modules() if m is model.get_input_embeddings()}
    assert real | tokens == set(names) | ({"lm_head"} if model_type in ("gemma", "gemma2") else set()), (
        "theirs is always tied"
    )
    assert len(set(names.values())) == len(names), "one to one"
    assert ARCHITECTURES[model_type].transposed == any(isinstance(m, Conv1D) for m in model.modules())


def test_what_a_gguf_adapter_cannot_hold_is_listed_and_not_written(tmp_path):
    ones = torch.ones(2, 2)
    value = adapter(
        {
            LAYER(0, "mlp.up_proj"): Dora(factors(1), torch.ones(32, 1)),
            "c": Factors(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), 2.0, "conv"),
            "x": Loha(ones, ones, ones, ones, 1.0),
        },
        embeddings={"<s>": torch.ones(3)},
        saved={"model.norm.weight": torch.ones(2)},
    )
    lost = "\n".join(gguf.losses(value))
    for said in (
        "1 saved weights",
        "another kind (x)",
        "1 textual-inversion embeddings",
        "1 convolutions (c)",
        "DoRA's magnitude",
    ):
        assert said in lost
    with pytest.raises(AdapterError, match="cannot hold all"):
        gguf.write(value, tmp_path / "x.gguf", LLAMA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module, f, base, said",
    [
        ("model.layers.0.self_attn.q_proj", factors(1), None, "give the base"),
        (
            "model.layers.0.self_attn.q_proj",
            factors(1),
            LLAMA | {"model_type": "lama"},
            "no GGUF name map here; did you mean 'llama'",
        ),
        (
            "model.layers.0.self_attn.q_proj",
            factors(1),
            LLAMA | {"num_attention_heads": "4"},
            "num_attention_heads is '4'",
        ),
        ("model.layers.0.self_attn.q_proj", factors(1, out=18), LLAMA, "18 output rows, not a multiple of 4 heads"),
        (
            "model.layers.0.self_attn.query",
            factors(1),
            LLAMA,
            "not in the base's architecture 'llama': model.layers.0.self_attn.query",
        ),
        ("model.layers.99999.self_attn.q_proj", factors(1), LLAMA, "layer 99,999; no model has that many"),
        ("lm_head", factors(1), LLAMA | {"tie_word_embeddings": True}, "has no output.weight to adapt"),
        ("lm_head", factors(1), LLAMA | {"model_type": "gemma2"}, "has no output.weight to adapt"),
        ("model.embed_tokens", factors(1), LLAMA, "'model.embed_tokens' holds factors of kind 'linear'"),
        ("model.layers.0.self_attn.q_proj", factors(1), "/no/such/base", "no base at '/no/such/base'"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(module, f, base, said, tmp_path):
    with pytest.raises(AdapterError, match=said):
        gguf.write(adapter({module: f}), tmp_path / "x.gguf", base)
    assert not list(tmp_path.iterdir())


def test_a_permuted_file_without_its_base_says_what_to_give(tmp_path):
    path = gguf.write(whole(), tmp_path / "x.gguf", LLAMA)
    with pytest.raises(
        AdapterError, match=r"permuted head by head, and the number of heads is not in the file\n  give the base"
    ):
        gguf.read(path)
    only_v = adapter({LAYER(0, "self_attn.v_proj"): factors(1)})
    assert gguf.read(gguf.write(only_v, tmp_path / "v.gguf", LLAMA)).rank == 3, "v needs none"


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdapterError, match=r"pip install 'lorakit\[gguf\]'"):
        gguf.write(whole(), tmp_path / "x.gguf", LLAMA)
    assert not list(tmp_path.iterdir())


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def made_by_hand(pairs: bytes = b"", count: int = 0, tensors: int = 0, tail: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + pairs + tail


TENSOR = struct.pack("<I", 2)  # its number of axes
HUGE = 1 << 62


@pytest.mark.parametrize(
    "content, said",
    [
        (b"GGUF", "it has 4 bytes"),
        (made_by_hand(tensors=HUGE), "it claims 4,611,686,018,427,387,904 tensors"),
        (made_by_hand(count=HUGE), "tensors and 4,611,686,018,427,387,904 pairs"),
        (made_by_hand(version=1), "version 1; expected 2 or 3"),
        (made_by_hand(version=3 << 24), "big-endian"),
        (made_by_hand(text("k") + struct.pack("<I", 99), 1), "unknown type 99"),
        (made_by_hand(text("k") + struct.pack("<IIQ", 9, 4, HUGE), 1), "the value of 'k' would take"),
        (made_by_hand(text("k") + struct.pack("<IIQ", 9, 8, HUGE), 1), "is an array of"),
        (made_by_hand(text("k") + struct.pack("<IIQ", 9, 9, 1) + b" " * 50, 1), "is an array of 1 values of type 9"),
        (made_by_hand(struct.pack("<Q", HUGE) + b" " * 40, 1), "the key of pair 0 would take"),
        (made_by_hand(2 * (text("k") + struct.pack("<IB", 0, 1)), 2), "key 'k' occurs twice"),
        (made_by_hand(struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe" + b" " * 40, 1), "not UTF-8"),
        (made_by_hand(tensors=1, tail=text("t") + struct.pack("<I", 9) + b" " * 50), "has 9 axes"),
        (
            made_by_hand(tensors=1, tail=text("t") + TENSOR + struct.pack("<QQIQ", HUGE, HUGE, 0, 0)),
            "would end at byte",
        ),
        (made_by_hand(tensors=1, tail=text("t") + TENSOR + struct.pack("<QQIQ", 2, 2, 0, HUGE)), "would end at byte"),
        (
            made_by_hand(tensors=1, tail=text("t") + TENSOR + struct.pack("<QQIQ", 2, 0, 0, 0)),
            "is not a multiple of the block size",
        ),
        (
            made_by_hand(tensors=1, tail=text("t") + TENSOR + struct.pack("<QQIQ", 2, 2, 12, 0)),
            "GGML type 12; adapters are read in",
        ),
        (made_by_hand(tensors=2, tail=2 * (text("t") + TENSOR + struct.pack("<QQIQ", 2, 2, 0, 0))), "occurs twice"),
        (
            made_by_hand(
                tensors=2, tail=b"".join(text(t) + TENSOR + struct.pack("<QQIQ", 2, 2, 0, 0) for t in "ab") + b" " * 40
            ),
            "claim more bytes together",
        ),
    ],
)
def test_false_claims_are_refused_before_memory_is_taken(content, said, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(AdapterError, match=said):
        gguf.read(path, LLAMA)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("general.type", "model", "is no LoRA adapter but a GGUF file with general.type 'model'"),
        ("adapter.type", "vector", "adapter.type 'vector'"),
        ("general.architecture", "mamba", "general.architecture is 'mamba', of which"),
        ("adapter.lora.alpha", "6", "'adapter.lora.alpha' is '6'; expected a number"),
        ("adapter.lora.alpha", -1.0, "alpha is -1.0; expected a positive number"),
        ("adapter.lora.alpha", float("nan"), "alpha is nan"),
        ("adapter.alora.invocation_tokens", 1, "aLoRA"),
        ("lorakit.metadata", "{", "key 'lorakit.metadata', line 1"),
        ("lorakit.metadata", '{"packed": {"model.layers.0.mlp.up_proj": [true, false]}}', "is packed as"),
    ],
)
def test_a_wrong_pair_is_refused_by_its_key(key, value, said, tmp_path):
    tensor = "blk.0.ffn_up.weight"
    path = by_package(tmp_path / "x.gguf", {key: value}, {f"{tensor}.lora_a": (3, 16), f"{tensor}.lora_b": (32, 3)})
    with pytest.raises(AdapterError, match=said):
        gguf.read(path)


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"blk.0.ffn_up.weight.lora_a": (3, 16)}, "has a lora_a and no lora_b"),
        ({"blk.0.ffn_up.weight.lora_b": (3, 16)}, "has a lora_b and no lora_a"),
        ({"blk.0.ffn_norm.weight": (16,)}, "expected names that end in .lora_a"),
        (
            {"blk.0.x.weight.lora_a": (3, 16), "blk.0.x.weight.lora_b": (32, 3)},
            "'blk.0.x.weight': no module of the architecture 'qwen3'",
        ),
        ({"blk.0.ffn_up.weight.lora_a": (3, 16), "blk.0.ffn_up.weight.lora_b": (32, 4)}, "expected the same"),
        ({"blk.0.ffn_up.weight.lora_a": (3, 16), "blk.0.ffn_up.weight.lora_b": (32,)}, "expected matrices"),
        ({"blk.99999999999999999999.ffn_up.weight.lora_a": (3, 16)}, "no model has that many"),
        ({}, "holds no tensors"),
    ],
)
def test_wrong_tensors_are_refused_by_their_names(tensors, said, tmp_path):
    path = by_package(tmp_path / "x.gguf", {}, tensors)
    with pytest.raises(AdapterError, match=said):
        gguf.read(path)


def by_package(path: Path, pairs: dict, tensors: dict[str, tuple[int, ...]]) -> Path:
    told = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0} | pairs
    writer = GGUFWriter(path, told.pop("general.architecture", "qwen3"))
    for key, value in told.items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_cut_and_damaged_files_give_an_adapter_or_an_error(tmp_path):
    """Every length, and 1500 files with some bytes of the header changed: nothing but AdapterError comes out."""
    good = gguf.write(adapter({LAYER(0, "self_attn.q_proj"): factors(1)}), tmp_path / "x.gguf", LLAMA).read_bytes()
    path, chance, refused = tmp_path / "y.gguf", random.Random(0), 0
    header = good.index(b"lora_b") + 60
    cut = [good[:n] for n in range(0, len(good), 7)]
    damaged = []
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(header)] = chance.choice([0, 1, 9, 127, 128, 255, chance.randrange(256)])
        damaged.append(bytes(data))
    for data in cut + damaged:
        path.write_bytes(data)
        try:
            gguf.read(path, LLAMA)
        except AdapterError:
            refused += 1
    assert refused > len(cut) + 500
