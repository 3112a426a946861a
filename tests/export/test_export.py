"""`export` checks an adapter against the receiver's rules, fixes it, writes it, and reads it back with independent
code.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError, ConfigError
from lorakit.export import RECEIVERS, export, findings

LAYER = "model.layers.0."


def factors(
    rank: int, alpha: float, size_in: int = 8, size_out: int = 8, dtype: torch.dtype = torch.float32, **more
) -> lk.Factors:
    made = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*shape, generator=made).to(dtype) for shape in ((rank, size_in), (size_out, rank)))
    return lk.Factors(A, B, alpha, **more)


def adapter(saved: dict | None = None, **modules: lk.Factors) -> lk.Adapter:
    named = {LAYER + name.replace("__", "."): f for name, f in modules.items()}
    return lk.Adapter(lk.LoraConfig(rank=8, alpha=16, targets=["q_proj", "v_proj"]), named, saved or {})


MIXED = adapter(self_attn__q_proj=factors(3, 6), self_attn__v_proj=factors(8, 4, rslora=True))


def largest(a: lk.Adapter, b: lk.Adapter) -> float:
    return max(float((b.factors[m].delta() - f.delta()).abs().max()) for m, f in a.factors.items())


@pytest.mark.parametrize("receiver", ["vllm", "sglang"])
def test_one_rank_and_one_scale_need_no_fix(tmp_path, receiver):
    value = adapter(self_attn__q_proj=factors(8, 16), self_attn__v_proj=factors(8, 16))
    assert export(value, tmp_path / "out", receiver, verify=True).mended == []
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 16


def test_a_scale_that_bf16_cannot_hold_is_folded_in_float32(tmp_path):
    value = adapter(
        self_attn__q_proj=factors(8, 13, rslora=True, dtype=torch.bfloat16),
        self_attn__v_proj=factors(4, 3, dtype=torch.bfloat16),
    )
    assert export(value, tmp_path / "out", "vllm", fix=True, verify=True).difference < 1e-6


@pytest.mark.parametrize("receiver", ["vllm", "sglang", "canonical"])
def test_ranks_and_scales_are_fixed_only_on_request(tmp_path, receiver):
    with pytest.raises(AdapterError, match=r"ranks 3, 8.*\n.*fold the scales into B.*--fix"):
        export(MIXED, tmp_path / "out", receiver)
    assert not (tmp_path / "out").exists()
    done = export(MIXED, tmp_path / "out", receiver, fix=True, verify=True)
    assert done.mended
    assert done.difference < 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    assert config["use_rslora"] is False
    assert largest(MIXED, lk.Adapter.load(tmp_path / "out")) < 1e-5


def test_ranks_are_padded_to_one_that_vllm_supports(tmp_path):
    odd = adapter(self_attn__q_proj=factors(12, 12))
    done = export(odd, tmp_path / "out", "vllm", fix=True, verify=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 16
    assert any("zero-pad to rank 16" in line for line in done.mended)
    assert done.difference == 0


REFUSED = {
    "a saved weight": (
        adapter({"model.norm.weight": torch.ones(8)}, self_attn__q_proj=factors(8, 8)),
        "saved weights",
        ("vllm", "sglang", "llama.cpp"),
    ),
    "two heads": (
        adapter(
            {"score.weight": torch.ones(2, 8), "classifier.weight": torch.ones(2, 8)}, self_attn__q_proj=factors(8, 8)
        ),
        "one head",
        ("vllm",),
    ),
    "a module it has no linear for": (adapter(strange=factors(8, 8)), "not linears that vLLM adapts", ("vllm",)),
    "DoRA": (
        adapter(self_attn__q_proj=Dora(factors(8, 8), torch.ones(8, 1))),
        "DoRA",
        ("vllm", "sglang", "llama.cpp", "canonical"),
    ),
    "too large a rank": (adapter(self_attn__q_proj=factors(600, 600)), "exceeds the server's largest", ("vllm",)),
    "textual inversion": (
        replace(adapter(self_attn__q_proj=factors(8, 8)), embeddings={"<s1>": torch.ones(8)}),
        "textual-inversion embeddings",
        ("vllm", "mlx", "peft"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_fixed_is_refused_with_a_way_out(tmp_path, kind):
    value, said, receivers = REFUSED[kind]
    for receiver in receivers:
        with pytest.raises(AdapterError, match=said) as error:
            export(value, tmp_path / "out", receiver, fix=True)
        assert len(str(error.value).splitlines()) >= 3, "each finding has its way out"
    assert list(tmp_path.iterdir()) == []


def test_a_plain_adapter_fits_every_receiver_and_one_head_fits_vllm():
    plain = adapter(self_attn__q_proj=factors(8, 8))
    assert all(findings(plain, receiver) == [] for receiver in RECEIVERS)
    assert findings(replace(plain, saved={"score.weight": torch.ones(2, 8)}), "vllm") == []


def test_an_unknown_receiver_suggests_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        export(MIXED, tmp_path, "vlm")


def test_ollama_needs_a_model_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        export(adapter(self_attn__q_proj=factors(8, 8)), tmp_path / "out", "ollama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_read_back_exactly(tmp_path, dtype):
    done = export(adapter(self_attn__q_proj=factors(8, 8, dtype=dtype)), tmp_path / "out", "peft", verify=True)
    assert done.difference == 0


def test_peft_applies_the_export_with_the_same_scale(tmp_path):
    import peft
    import tiny

    model = tiny.llama()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("q_proj", "v_proj"))]
    own = dict(model.named_modules())
    value = lk.Adapter(
        lk.LoraConfig(rank=2, alpha=2, targets=["q_proj", "v_proj"]),
        {
            n: factors(2 + i, 3.0 + i, own[n].in_features, own[n].out_features, rslora=bool(i % 2))
            for i, n in enumerate(names)
        },
    )
    export(value, tmp_path / "out", "canonical", fix=True)
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    ids = torch.tensor([[1, 5, 7, 9]])
    ours = lk.attach(model, value)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
IMAGE = lk.Adapter(
    lk.LoraConfig(rank=2, alpha=2, targets=["to_q", "to_k"]),
    {UNET + "to_q": factors(2, 3, 320, 320), UNET + "to_k": factors(4, 1, 320, 320)},
)
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 16,
}


@pytest.mark.parametrize(
    "receiver, name", [("comfyui", "x.safetensors"), ("a1111", "x.safetensors"), ("diffusers", "out")]
)
def test_image_programs_get_the_same_update(tmp_path, receiver, name):
    done = export(IMAGE, tmp_path / name, receiver, verify=True)
    assert done.difference < 1e-6
    assert largest(IMAGE, lk.Adapter.load(tmp_path / name)) < 1e-4


def test_a_text_encoder_with_only_feed_forward_layers_is_verified(tmp_path):
    value = lk.Adapter(
        lk.LoraConfig(rank=2, alpha=2, targets=["fc1"]),
        {"text_encoder.text_model.encoder.layers.0.mlp.fc1": factors(2, 3, 768, 3072)},
    )
    assert export(value, tmp_path / "out", "diffusers", verify=True).difference < 1e-6


def test_kohya_keys_of_several_modules_are_verified_by_rows(tmp_path):
    attention = "transformer.transformer_blocks.0.attn."
    names = [attention + n for n in ("to_q", "to_k", "to_v")]
    flux = lk.Adapter(
        lk.LoraConfig(rank=2, alpha=2, targets=["to_q"]),
        {n: factors(2 + i, 3, 3072, 3072) for i, n in enumerate(names)},
        metadata={"model": "flux"},
    )
    done = export(flux, tmp_path / "x.safetensors", "comfyui", verify=True)
    assert done.difference < 1e-6
    assert len(load_file(tmp_path / "x.safetensors")) == 3


@pytest.mark.parametrize("receiver", ["llama.cpp", "ollama"])
def test_a_gguf_has_llama_cpps_row_order_and_the_modelfile_names_it(tmp_path, receiver):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    value = adapter(self_attn__q_proj=factors(3, 6, 16, 16), self_attn__v_proj=factors(8, 4, 16, 8, rslora=True))
    done = export(value, tmp_path / "lora.gguf", receiver, verify=True, base=tmp_path / "base", model="llama3.2")
    assert done.difference < 1e-6
    embedding = adapter(self_attn__q_proj=factors(3, 6, 16, 16))
    tokens = lk.Factors(torch.randn(3, 40), torch.randn(16, 3), 5.0, "embedding")
    embedding = replace(embedding, updates={**embedding.factors, "model.embed_tokens": tokens})
    assert export(embedding, tmp_path / "e.gguf", "llama.cpp", verify=True, base=tmp_path / "base").difference < 1e-6
    if receiver == "ollama":
        assert (tmp_path / "Modelfile").read_text() == "FROM llama3.2\nADAPTER ./lora.gguf\n"


def test_mlx_gets_the_same_update(tmp_path):
    assert export(MIXED, tmp_path / "out", "mlx", verify=True).difference < 1e-6


PLACES = {"peft": "out", "mlx": "out", "gguf": "x.gguf", "kohya": "x.safetensors", "diffusers": "out"}


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_a_receiver_accepts_what_was_written_for_it(tmp_path, receiver):
    """Starts from ranks and scales that no receiver accepts, and checks its rules again on what is loaded from OUT."""
    kind = RECEIVERS[receiver].format
    modules = (
        (UNET + "to_q", UNET + "to_k")
        if kind in ("kohya", "diffusers")
        else (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj")
    )
    mixed = {modules[0]: factors(7, 3, 320, 320, rslora=True), modules[1]: factors(9, 4, 320, 320, rslora=True)}
    value = lk.Adapter(lk.LoraConfig(rank=7, alpha=3, rslora=True, targets=["to_q"]), mixed)
    one = replace(value, updates={m: factors(7, 3, 320, 320, rslora=True) for m in modules})
    config = LLAMA | {"hidden_size": 320, "num_key_value_heads": 4}
    for number, given in enumerate((value, one)):
        place = tmp_path / str(number) / PLACES[kind]
        export(given, place, receiver, fix=True, verify=True, base=config, model="m")
        read = lk.Adapter.load(place, base=config) if kind == "gguf" else lk.Adapter.load(place)
        assert findings(read, receiver) == []
        assert largest(given, read) < 1e-3


def test_a_different_modelfile_is_replaced_only_if_forced(tmp_path):
    value = adapter(self_attn__q_proj=factors(3, 6, 16, 16))
    mine = tmp_path / "Modelfile"
    mine.write_text("FROM mine\n")
    with pytest.raises(ConfigError, match="Modelfile exists with other content"):
        export(value, tmp_path / "lora.gguf", "ollama", base=LLAMA, model="llama3.2")
    assert [p.name for p in tmp_path.iterdir()] == ["Modelfile"]
    assert mine.read_text() == "FROM mine\n"
    export(value, tmp_path / "lora.gguf", "ollama", base=LLAMA, model="llama3.2", force=True)
    export(value, tmp_path / "lora.gguf", "ollama", base=LLAMA, model="llama3.2")  # the same again
    assert mine.read_text() == "FROM llama3.2\nADAPTER ./lora.gguf\n"
    mine.unlink()
    mine.mkdir()
    with pytest.raises(ConfigError, match="Modelfile is a folder"):
        export(value, tmp_path / "lora.gguf", "ollama", base=LLAMA, model="llama3.2", force=True)


def test_textual_inversion_embeddings_can_be_left_out_as_the_refusal_says(tmp_path):
    from lorakit.formats.convert import convert

    value = replace(adapter(self_attn__q_proj=factors(8, 8)), embeddings={"<s1>": torch.ones(8)})
    with pytest.raises(AdapterError, match="lorakit convert --allow-loss leaves them out"):
        export(value, tmp_path / "out", "vllm")
    convert(value, tmp_path / "plain", "peft", allow_loss=True)
    assert export(lk.Adapter.load(tmp_path / "plain"), tmp_path / "out", "vllm").files
