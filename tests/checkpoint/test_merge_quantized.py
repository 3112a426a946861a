"""A quantized base merges into an ordinary checkpoint, which computes what base and adapter do."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import quantized
import quantized_bases as bases
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.fingerprint import sample_positions
from lorakit.checkpoint import merge_checkpoint
from lorakit.checkpoint.base import open_base
from lorakit.errors import AdapterError
from lorakit.layers.bases import fingerprinted
from lorakit.layers.bases import quantized as quantized_modules


@pytest.fixture(autouse=True)
def _library():
    quantized.library()


@pytest.mark.parametrize("kind", bases.KINDS)
def test_merged_model_computes_what_quantized_base_and_adapter_do(kind, tmp_path):
    adapter, model = bases.adapter(), bases.dense(kind)
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", dtype=torch.float32)
    lk.attach(model, adapter, force=True)
    merged = bases.load(tmp_path / "out")
    torch.testing.assert_close(bases.logits(merged), bases.logits(model), atol=2e-5, rtol=0)
    assert report.dequantized == 14
    assert "14 quantized weights written as float32" in report.outcome()
    assert not any("quantization" in str(key) for key in json.loads((tmp_path / "out" / "config.json").read_text()))
    lk.merge(model)
    for name, weight in lk.detach(model, merged="keep").state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", bases.KINDS)
def test_files_and_the_loaded_model_have_the_same_samples_and_errors(kind):
    """So an adapter that attaches to a base merges into its folder, and the other way round."""
    base, model = open_base(bases.packed(kind), quantized=True), bases.load(bases.packed(kind))
    packed = quantized_modules(model)
    assert len(packed) == 14
    for name, module in packed.items():
        slot, live = base.tensors[f"{name}.weight"], fingerprinted(module)
        at = torch.tensor(sample_positions(live.numel()))
        for ours, theirs in zip(slot.sampled(at), live.read(at), strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_it_is_written_in_16_bits_and_other_tensors_keep_their_bytes(kind, tmp_path):
    base, adapter = bases.packed(kind), bases.adapter(targets=["q_proj"])
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.float16 if kind == "gptq" else torch.bfloat16  # the config says float16, and float32
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == expected
    same = [name for name in after if name in before and before[name].dtype == after[name].dtype]
    assert report.untouched == len(same) == 7
    assert all(torch.equal(after[name], before[name]) for name in same)
    model = bases.dense(kind)
    lk.attach(model, adapter, force=True)
    torch.testing.assert_close(bases.logits(bases.load(tmp_path / "out")), bases.logits(model), atol=3e-3, rtol=0)
    W = model.model.layers[1].mlp.up_proj.weight  # that no adapter changes
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], W.to(expected))


def test_the_adapter_was_trained_on_the_quantized_model_and_knows_it_again(tmp_path):
    for kind in ("nf4-double", "int8"):
        adapter = bases.adapter(model=bases.load(bases.packed(kind)))
        assert adapter.metadata["fingerprint"]["rounding"]
        assert not merge_checkpoint(bases.packed(kind), adapter, tmp_path / kind).warnings
    other = quantized.llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    with pytest.raises(AdapterError, match="trained on another base"):
        merge_checkpoint(bases.packed("nf4"), bases.adapter(model=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "loha"},
        {"save_modules": ["lm_head"], "targets": ["down_proj"]},
        {"targets": ["embed_tokens", "k_proj"]},
    ],
)
def test_other_kinds_of_updates(settings, tmp_path):
    adapter, model = bases.adapter(**settings), bases.dense("nf4")
    merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", dtype=torch.float32)
    lk.attach(model, adapter, force=True)
    torch.testing.assert_close(bases.logits(bases.load(tmp_path / "out")), bases.logits(model), atol=2e-5, rtol=0)


def test_dora_takes_the_norm_of_the_dequantized_weight(tmp_path):
    from lorakit.adapter.dora import Dora

    name = "model.layers.0.self_attn.q_proj"
    adapter = bases.adapter(targets=[name])
    inner, magnitude = adapter.factors[name], torch.linspace(0.5, 2, 64)
    dora = replace(adapter, updates={name: Dora(inner, magnitude[:, None])})
    merge_checkpoint(bases.packed("nf4"), dora, tmp_path / "out", dtype=torch.float32)
    W = bases.dense("nf4").get_submodule(name).weight.detach() + inner.delta()
    written = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(written, W / W.norm(dim=1, keepdim=True) * magnitude[:, None], atol=1e-5, rtol=0)


def test_more_kinds_of_updates(tmp_path):
    """LoKr on a quantized weight, changed rows of the embedding and of a quantized output layer."""
    from lorakit.adapter.lokr import Lokr
    from lorakit.adapter.tokens import Tokens

    made = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.down_proj"
    lokr = Lokr(2.0, w1=torch.randn(8, 8, generator=made), w2=torch.randn(8, 16, generator=made) * 0.02)
    rows = torch.randn(2, 64, generator=made)
    tokens = {
        "model.embed_tokens": Tokens((3, 7), rows),
        "model.layers.0.mlp.up_proj": Tokens((0, 100), rows, "linear"),
    }
    adapter = replace(bases.adapter(targets=["q_proj"]), updates={name: lokr, **tokens})
    merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", dtype=torch.float32)
    written, before = load_file(tmp_path / "out" / "model.safetensors"), bases.dense("nf4").state_dict()
    torch.testing.assert_close(written[f"{name}.weight"], before[f"{name}.weight"] + lokr.delta(), atol=1e-6, rtol=0)
    for module, update in tokens.items():
        expected = before[f"{module}.weight"].clone()
        expected[list(update.ids)] = rows
        torch.testing.assert_close(written[f"{module}.weight"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_gpt2_is_written_in_the_layout_of_its_class(bias, tmp_path):
    from transformers import AutoModelForCausalLM

    quantized.gpt2().save_pretrained(tmp_path / "dense")
    loaded = quantized.in_4_bits(tmp_path / "dense", bnb_4bit_compute_dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "packed")
    adapter = bases.adapter(model=loaded, targets=["c_attn", "c_proj", "c_fc"], bias=bias)
    assert bool(adapter.saved) == (bias == "lora_only")
    expected = bases.logits(loaded)
    merge_checkpoint(tmp_path / "packed", adapter, tmp_path / "out", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert merged.transformer.h[0].mlp.c_fc.weight.shape == (64, 256)
    torch.testing.assert_close(bases.logits(merged), expected, atol=2e-5, rtol=0)
    onto = {"onto": tmp_path / "dense", "requantize": "same"}
    assert len(merge_checkpoint(tmp_path / "packed", adapter, tmp_path / "again", **onto).requantized) == 8
    again = bases.logits(bases.load(tmp_path / "again"))
    lk.attach(dense := quantized.gpt2(), adapter, force=True)
    assert (again - bases.logits(dense)).norm() < 0.5 * (again - bases.logits(quantized.gpt2())).norm()


def test_tied_and_sharded_files_and_a_settings_file(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": tiny.VOCAB}
    config = LlamaConfig(num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    loaded = quantized.in_4_bits(tmp_path / "dense", bnb_4bit_compute_dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    (tmp_path / "packed" / "quantize_config.json").write_text("{}")
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    adapter = bases.adapter(model=loaded)
    expected = bases.logits(loaded)
    report = merge_checkpoint(tmp_path / "packed", adapter, tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(bases.logits(bases.load(tmp_path / "out")), expected, atol=2e-5, rtol=0)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    every = {n: f for f in (tmp_path / "out").glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == {name: every[name].name for name in every}
    assert len(set(every.values())) > 2
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert any("quantize_config.json" in warning for warning in report.warnings)
    again = merge_checkpoint(tmp_path / "packed", adapter, tmp_path / "again", requantize="same", keep_at_least=0)
    assert (tmp_path / "again" / "quantize_config.json").is_file()
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    every = {n: f for f in (tmp_path / "again").glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == {name: every[name].name for name in every}
    assert again.tensors == len(every)
    assert bool(bases.logits(bases.load(tmp_path / "again")).isfinite().all())


def test_the_config_of_a_nested_language_model_may_say_how_it_is_quantized(tmp_path):
    folder = shutil.copytree(bases.packed("nf4"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert merge_checkpoint(folder, bases.adapter(), tmp_path / "out").dequantized == 14
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == {"hidden_size": 64}
    merge_checkpoint(folder, bases.adapter(), tmp_path / "again", requantize="int8")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]
    assert written["quantization_config"]["load_in_8bit"]


@pytest.mark.parametrize("requantize", [None, "same"])
def test_an_interrupted_merge_leaves_nothing(requantize, tmp_path):
    def stop(name: str, done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(bases.packed("nf4"), bases.adapter(), tmp_path / "out", requantize=requantize, on_tensor=stop)
    assert not list(tmp_path.iterdir())


def test_no_library_is_imported(tmp_path):
    import subprocess

    adapter = bases.adapter()
    adapter.save(tmp_path / "adapter")
    program = (
        "import sys\nfrom lorakit.checkpoint import merge_checkpoint\n"
        f"merge_checkpoint({str(bases.packed('nf4'))!r}, {str(tmp_path / 'adapter')!r}, {str(tmp_path / 'out')!r})\n"
        "assert not {'bitsandbytes', 'gptqmodel', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "config,said",
    [
        ({"quant_method": "hqq"}, r"quantized \(hqq\) in a format that cannot be merged(.|\n)*unquantized base"),
        ({"quant_method": "compressed-tensors"}, "cannot be merged"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4}, r"none of its tensors is: no '....qweight'"),
    ],
)
def test_a_format_that_cannot_be_read_is_refused(config, said, tmp_path):
    folder = shutil.copytree(bases.unquantized(), tmp_path / "base")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | {"quantization_config": config}))
    with pytest.raises(lk.LorakitError, match=said):
        merge_checkpoint(folder, bases.adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind,tensor,change,said",
    [
        ("nf4", "weight.quant_state.bitsandbytes__nf4", None, "missing or damaged"),
        ("nf4", "weight.absmax", lambda t: t[:-1], "expected 2,048 and 64"),
        ("int8", "SCB", lambda t: t[:-1], r"scales \(SCB\) \[63\]"),
        ("gptq", "qzeros", None, "has no 'qzeros'"),
        ("awq", "scales", lambda t: t[:-1], r"scales is \[1, 64\]"),
    ],
)
def test_damaged_tensors_are_named_and_nothing_is_written(kind, tensor, change, said, tmp_path):
    folder = shutil.copytree(bases.packed(kind), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{tensor}"
    damaged = tensors.pop(name)
    if change is not None:
        tensors[name] = change(damaged).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(lk.LorakitError, match=said):
        merge_checkpoint(folder, bases.adapter(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_an_adapter_that_starts_from_the_bases_weights_needs_the_unquantized_ones(tmp_path):
    import peft

    model = peft.get_peft_model(
        quantized.llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4)
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(lk.LorakitError, match=r"is quantized(.|\n)*give the unquantized checkpoint"):
        merge_checkpoint(bases.packed("nf4"), tmp_path / "adapter", tmp_path / "out")


def test_extract_and_a_scaled_saved_weight_are_refused_as_before(tmp_path):
    from lorakit.checkpoint.extract import extract

    with pytest.raises(lk.LorakitError, match=r"is quantized \(nf4\)"):
        extract(bases.unquantized(), bases.packed("nf4"), rank=4)
    saved = bases.adapter(save_modules=["lm_head"], targets=["q_proj"])
    with pytest.raises(AdapterError, match="cannot be scaled"):
        merge_checkpoint(bases.packed("nf4"), replace(saved), tmp_path / "out", weights=[0.5])
