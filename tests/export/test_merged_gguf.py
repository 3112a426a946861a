"""Merged models as GGUF, checked with transformers, the `gguf` package and a live model with the adapter attached."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import packed_checkpoints
import pytest
import quantized
import tiny
import tiny_lm
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.bases.load import embedded_folder
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import ConfigError, LorakitError
from lorakit.export import gguf_model
from lorakit.export.gguf_parameters import llama3_factors
from lorakit.export.merged import export_merged
from lorakit.formats.gguf_names import unpermute

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def model_of(kind: str):
    import transformers as tf

    torch.manual_seed(0)
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1, eos_token_id=1)
        )
    else:
        more = {"qwen3": {"head_dim": 128}, "gemma": {"head_dim": 16}, "llama": {"rms_norm_eps": 1e-3}}.get(kind, {})
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}[kind]
        model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**SIZES | more))
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide mixed-up tensors
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


TARGETS = {"gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def base_adapter_model(folder, model, targets=None, **more):
    """(the base's folder, an adapter of it, the model with the adapter attached)."""
    base = tiny_lm.save(folder / "base", model)
    lk.attach(model, lk.LoraConfig(rank=3, targets=targets or TARGETS.get(model.config.model_type, LINEARS), **more))
    tiny.randomise_factors(model, size=0.1)
    return base, lk.capture(model), model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(1))).logits


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def read(path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_transformers_gives_the_same_logits_from_the_file(kind, tmp_path):
    base, adapter, live = base_adapter_model(tmp_path, model_of(kind))
    done = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32")
    torch.testing.assert_close(logits(loaded(done.files[0])), logits(live), atol=2e-5, rtol=0)
    assert not torch.allclose(logits(live), logits(lk.detach(live)), atol=0.1), "the adapter has an effect to be lost"


def test_a_changed_tied_head_gets_its_own_tensor(tmp_path):
    torch.manual_seed(0)
    base, adapter, live = base_adapter_model(tmp_path, tiny_lm.llama(tied=True), ["lm_head", "q_proj"])
    path = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32").files[0]
    there = read(path)
    assert not np.array_equal(there["output.weight"], there["token_embd.weight"])
    ids = torch.tensor([[3, 9, 27, 81, 243]])
    torch.testing.assert_close(loaded(path)(input_ids=ids).logits, live(input_ids=ids).logits, atol=2e-5, rtol=0)


def test_a_tied_model_has_no_head_tensor(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama(tied=True))
    assert "output.weight" not in read(export_merged(adapter, base, tmp_path / "x.gguf").files[0])


def test_saved_modules_are_merged(tmp_path):
    base, adapter, live = base_adapter_model(tmp_path, model_of("llama"), save_modules=["norm"])
    assert "model.norm.weight" in adapter.saved
    path = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32", verify=True).files[0]
    torch.testing.assert_close(logits(loaded(path)), logits(live), atol=2e-5, rtol=0)


def test_dora_loha_and_whole_updates_are_merged(tmp_path):
    base, adapter, live = base_adapter_model(tmp_path, model_of("llama"))
    lk.detach(live)
    w = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    loha = Loha(w[0].T.contiguous(), w[1], w[2].T.contiguous(), w[3], 4.0)
    name = "model.layers.0.self_attn.o_proj"
    dora = Dora(adapter.factors[name], torch.rand(32, 1) + 0.5)
    norm = "model.layers.1.post_attention_layernorm"
    known = replace(adapter, updates={name: dora, "model.layers.1.self_attn.o_proj": loha})
    assert not export_merged(known, base, tmp_path / "y.gguf", dtype="f32", verify=True).verified.note
    odd = replace(known, updates={**known.updates, norm: Dense(torch.rand(32))})
    done = export_merged(odd, base, tmp_path / "x.gguf", dtype="f32", verify=True)
    assert done.verified.logits < 1e-5
    assert "a live model takes only kinds of update that lorakit trains" in done.verified.note
    there = read(done.files[0])
    V = live.get_submodule(name).weight.detach() + dora.inner.delta()
    wanted = dora.magnitude * V / V.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(there["blk.0.attn_output.weight"], wanted.numpy(), atol=1e-6)
    wanted = live.get_submodule(norm).weight.detach() + odd.updates[norm].delta()
    np.testing.assert_allclose(there["blk.1.ffn_norm.weight"], wanted.numpy(), atol=1e-6)
    wanted = live.model.layers[1].self_attn.o_proj.weight.detach() + loha.delta()
    np.testing.assert_allclose(there["blk.1.attn_output.weight"], wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_verify_accepts_rounding_for_a_large_adapter(dtype, tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, model_of("llama"))
    done = export_merged(12.0 * adapter, base, tmp_path / "x.gguf", dtype=dtype, verify=True)
    assert done.verified.logits > 0.003


@pytest.mark.parametrize("dtype, bound", [("f32", 1e-7), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.0045)])
def test_every_tensor_is_the_merged_one_rounded_once(dtype, bound, tmp_path):
    base, adapter, live = base_adapter_model(tmp_path, model_of("llama"))
    done = export_merged(adapter, base, tmp_path / "x.gguf", dtype=dtype, verify=True)
    assert done.verified.tensors <= bound
    assert done.verified.logits < {"f32": 1e-5, "f16": 0.02, "bf16": 0.1, "q8_0": 0.3}[dtype]
    lk.merge(live)
    there = read(done.files[0])
    assert len(there) == done.tensors == 2 * 9 + 3
    for name, module in {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
    }.items():
        wanted = live.get_submodule(module).weight.detach().numpy()
        exact = 1e-7 if wanted.ndim == 1 else bound
        assert np.abs(there[f"{name}.weight"] - wanted).max() <= exact * np.abs(wanted).max() + 1e-9, name
    for letter, heads in (("q", 4), ("k", 2)):
        wanted = live.get_submodule(f"model.layers.0.self_attn.{letter}_proj").weight.detach().numpy()
        assert (
            np.abs(unpermute(there[f"blk.0.attn_{letter}.weight"], heads, letter) - wanted).max()
            <= bound * np.abs(wanted).max() + 1e-9
        )


def test_rows_that_do_not_fit_q8_0_blocks_are_stored_in_f16(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())  # its down_proj has 48 inputs
    done = export_merged(adapter, base, tmp_path / "x.gguf", dtype="q8_0", verify=True)
    assert done.other == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(done.files[0]).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_norm.weight"]) == (
        "F16",
        "Q8_0",
        "F32",
    )


def test_llama_biases_are_permuted_like_their_rows(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    base, adapter, live = base_adapter_model(tmp_path, model)
    done = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32", verify=True)
    assert "presence of biases" in done.verified.note
    assert done.verified.logits < 1e-5
    there = read(done.files[0])
    wanted = live.model.layers[1].self_attn.k_proj.bias.detach().numpy()
    np.testing.assert_array_equal(unpermute(there["blk.1.attn_k.bias"][:, None], 2, "k")[:, 0], wanted)


def test_gemma_norms_are_stored_plus_one(tmp_path):
    base, adapter, live = base_adapter_model(tmp_path, model_of("gemma"))
    done = export_merged(adapter, base, tmp_path / "x.gguf", verify=True)
    assert done.verified.logits is None
    assert "does not read a gemma from a GGUF" in done.verified.note
    np.testing.assert_allclose(
        read(done.files[0])["output_norm.weight"], 1 + live.model.norm.weight.detach().numpy(), rtol=1e-6
    )


def test_llama_3_rope_frequencies_match_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    factors = llama3_factors(rope, 5e5, 128)
    assert 1 < len(factors.unique()) < 64, "ones, eights and some between"
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    small = LlamaConfig(**SIZES, rope_parameters=rope | {"original_max_position_embeddings": 64})
    from transformers import LlamaForCausalLM

    base, adapter, _ = base_adapter_model(tmp_path, LlamaForCausalLM(small))
    done = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32", verify=True)
    assert read(done.files[0])["rope_freqs.weight"].shape == (4,)
    assert "rotary scaling" in done.verified.note


def test_hyper_parameters_are_written_under_llama_cpps_keys(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, model_of("llama"))
    path = export_merged(adapter, base, tmp_path / "x.gguf", dtype="q8_0").files[0]
    pairs = {k: f.contents() for k, f in GGUFReader(path).fields.items()}
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 260,
        "llama.context_length": 1024,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
    }
    assert {k: pairs[k] for k in wanted} == wanted
    assert pairs["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert len(pairs["tokenizer.ggml.tokens"]) == 260


def test_the_embedded_models_tokenizer_gives_the_same_tokens(tmp_path):
    base = embedded_folder()
    path = export_merged(None, base, tmp_path / "x.gguf", dtype="q8_0").files[0]
    ours, theirs = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (
        "Once upon a time, there was",
        "In 1984 or 3.14\nand\n\nmore\t tabs",
        "Café, naïve, 東京, привет, 🙂👍🏽",
        " a b ",
        "<|endoftext|>x",
    ):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text
    assert theirs.eos_token_id == ours.eos_token_id


def test_ollama_gets_a_folder_with_a_modelfile(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    done = export_merged(adapter, base, tmp_path / "out", "ollama")
    assert [f.relative_to(tmp_path / "out").name for f in done.files] == ["model.gguf", "Modelfile"]
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert json.dumps(done.to_dict())


def test_verify_detects_rows_in_the_wrong_order_and_keeps_the_old_file(tmp_path, monkeypatch):
    base, adapter, _ = base_adapter_model(tmp_path, model_of("llama"))
    (tmp_path / "x.gguf").write_text("older")
    monkeypatch.setattr(gguf_model, "permute", lambda rows, heads, name: rows)
    with pytest.raises(LorakitError, match="its logits are off"):
        export_merged(adapter, base, tmp_path / "x.gguf", verify=True)
    assert (tmp_path / "x.gguf").read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "x.gguf"]


def test_verify_detects_a_wrong_tensor(tmp_path, monkeypatch):
    base, adapter, _ = base_adapter_model(tmp_path, model_of("llama"))
    from lorakit.export import merged

    def shifted(values, kind, name):
        return encode(values + (0.02 if name == "blk.1.ffn_up.weight" else 0), kind, name)

    encode = merged.encode
    monkeypatch.setattr(merged, "encode", shifted)
    with pytest.raises(LorakitError, match=r"'blk.1.ffn_up.weight' is off by 0\.02"):
        export_merged(adapter, base, tmp_path / "x.gguf", dtype="f16", verify=True)
    assert not (tmp_path / "x.gguf").exists()


def test_values_too_large_for_f16_are_refused(tmp_path):
    model = tiny_lm.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e5
    base, adapter, _ = base_adapter_model(tmp_path, model)
    with pytest.raises(
        LorakitError, match=r"'blk.0.ffn_up.weight' has values too large for f16 \(1e\+05\)\n.*bf16 or f32"
    ):
        export_merged(adapter, base, tmp_path / "x.gguf", dtype="f16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    assert export_merged(adapter, base, tmp_path / "x.gguf", dtype="bf16", verify=True)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"model_type": "falcon"},
            "writes GGUF models of llama, mistral, qwen2, qwen3, gemma, gpt2; the base is a falcon",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp computes a llama only with 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
            r"factor = -2.0; expected a positive number",
        ),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors of a llama with its config: blk.2.attn_norm"),
        ({"num_hidden_layers": 1}, r"tensors have no place in a GGUF of a llama: model.layers.1"),
        ({"vocab_size": 300}, r"embedding is \[258, 32\], but its config says \[300, 32\]"),
    ],
)
def test_a_base_that_llama_cpp_computes_differently_is_refused(changes, said, tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LorakitError, match=said):
        export_merged(adapter, base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_invalid_calls_are_errors(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    with pytest.raises(ConfigError, match="which vllm does not read\n  lorakit merge"):
        export_merged(adapter, base, tmp_path / "x.gguf", "vllm")
    with pytest.raises(ConfigError, match="needs its base"):
        export_merged(adapter, None, tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="dtype 'q8' is not supported; did you mean 'q8_0'"):
        export_merged(adapter, base, tmp_path / "x.gguf", dtype="q8")
    with pytest.raises(LorakitError, match="only textual-inversion embeddings"):
        export_merged(replace(adapter, updates={}, embeddings={"<x>": torch.ones(32)}), base, tmp_path / "x.gguf")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(LorakitError, match="tokenizer"):
        export_merged(adapter, base, tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_textual_inversion_embeddings_are_left_out_with_a_warning(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    done = export_merged(replace(adapter, embeddings={"<x>": torch.ones(32)}), base, tmp_path / "x.gguf", verify=True)
    (warning,) = done.warnings
    assert warning.startswith("left out: textual-inversion embeddings (<x>), which are not part of any weight")
    assert "OUT" not in warning


def test_a_head_added_by_the_adapter_is_refused_by_name(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    with pytest.raises(
        LorakitError, match=r"the adapter adds weights that a GGUF of a llama cannot hold: score.weight\n"
    ):
        export_merged(replace(adapter, saved={"score.weight": torch.ones(2, 32)}), base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("name", ["hidden_act", "hidden_activation"])
def test_a_gemma_with_another_activation_is_refused(name, tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, model_of("gemma"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {name: "relu"}))
    with pytest.raises(
        LorakitError, match=f"the base's {name} is 'relu'; llama.cpp computes a gemma only with 'gelu_pytorch_tanh'"
    ):
        export_merged(adapter, base, tmp_path / "x.gguf")
    (base / "config.json").write_text(
        json.dumps(config | {"hidden_act": "gelu"})
    )  # as the first releases have it, meaning gelu_pytorch_tanh
    assert export_merged(adapter, base, tmp_path / "x.gguf").tensors


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.gpt2(), ["c_attn"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(
        LorakitError, match=r"has no tokenizer: transformers makes up an empty GPT2Tokenizer\n.*tokenizer\.json"
    ):
        export_merged(adapter, base, tmp_path / "x.gguf")
    (base / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (base / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(LorakitError, match="the tokenizer has 2 tokens, but the embedding has 258 rows"):
        export_merged(adapter, base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "no merges", "vocab a list"])
def test_a_malformed_tokenizer_is_an_error_that_names_the_base(text, tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    content = json.loads((base / "tokenizer.json").read_text())
    damaged = {
        "no merges": {k: v for k, v in content["model"].items() if k != "merges"},
        "vocab a list": content["model"] | {"vocab": [1]},
    }
    (base / "tokenizer.json").write_text(json.dumps(content | {"model": damaged[text]}) if text in damaged else text)
    with pytest.raises(LorakitError, match=f"cannot load '{base}' with AutoTokenizer: "):
        export_merged(adapter, base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_different_modelfile_is_replaced_only_if_forced(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    (tmp_path / "o").mkdir()
    mine = tmp_path / "o" / "Modelfile"
    mine.write_text("FROM llama3.2\nSYSTEM be kind\n")
    with pytest.raises(ConfigError, match="Modelfile exists with other content"):
        export_merged(adapter, base, tmp_path / "o" / "x.gguf", "ollama")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["Modelfile"]
    assert mine.read_text() == "FROM llama3.2\nSYSTEM be kind\n"
    export_merged(adapter, base, tmp_path / "o" / "x.gguf", "ollama", force=True)
    assert mine.read_text() == "FROM ./x.gguf\n"
    export_merged(adapter, base, tmp_path / "o" / "x.gguf", "ollama")  # the same again


def test_an_adapter_of_another_base_is_refused_unless_forced(tmp_path):
    _, adapter, _ = base_adapter_model(tmp_path / "a", tiny_lm.llama(seed=0))
    other = tiny_lm.save(tmp_path / "b", tiny_lm.llama(seed=1))
    with pytest.raises(LorakitError, match="trained on another base"):
        export_merged(adapter, other, tmp_path / "x.gguf")
    assert export_merged(adapter, other, tmp_path / "x.gguf", force_base=True, verify=True).verified.logits < 0.1


def test_tensors_are_compared_where_logits_cannot_be(tmp_path):
    base, adapter, _ = base_adapter_model(tmp_path, tiny_lm.llama())
    done = export_merged(
        replace(adapter, config=adapter.config.replace(task="SEQ_CLS")), base, tmp_path / "x.gguf", verify=True
    )
    assert done.verified.logits is None
    assert str(done.verified).endswith("logits not compared (the adapter is for SEQ_CLS, not for language modelling)")
    assert 0 < done.verified.tensors < 2**-11


@pytest.mark.parametrize("how", ["gptq", "awq", "nf4"])
def test_a_quantized_base_is_dequantized(how, tmp_path):
    if how == "nf4":
        base = quantized.save(tmp_path)[1]
    else:
        config = getattr(packed_checkpoints, f"{how}_config")()
        base, _ = packed_checkpoints.save(tmp_path / "base", config, quantized.llama(vocabulary=258))
        tiny_lm.tokenizer().save_pretrained(base)
    lk.attach(model := quantized.llama(vocabulary=258), lk.LoraConfig(rank=3, targets=LINEARS))
    tiny.randomise_factors(model, size=0.1)
    adapter = replace(lk.capture(model), metadata={})
    path = export_merged(adapter, base, tmp_path / "x.gguf", dtype="f32", verify=True).files[0]
    merge_checkpoint(base, adapter, tmp_path / "merged", dtype=torch.float32)
    ordinary = export_merged(None, tmp_path / "merged", tmp_path / "y.gguf", dtype="f32").files[0]
    first, second = read(path), read(ordinary)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
