"""Merging into checkpoint folders: what is written computes what the attached adapter computes, and nothing else
changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import logits, randomise_factors

import lorakit as lk
from lorakit.adapter.fingerprint import fingerprint
from lorakit.analysis.merge_tables import tables
from lorakit.checkpoint import merge_checkpoint

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def trained(model, **config) -> lk.Adapter:
    """An adapter with random factors, left attached to the model."""
    lk.attach(model, lk.LoraConfig(**{"rank": 3, "alpha": 6, **config}))
    return lk.capture(randomise_factors(model))


def load(model, folder: Path, **options):
    """The folder, by the model's own class."""
    return type(model).from_pretrained(folder, dtype="auto", **options).eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def rename_tensors(folder: Path, rename) -> None:
    save_file({rename(n): t for n, t in weights(folder).items()}, folder / "model.safetensors", {"format": "pt"})


MODELS = {
    "llama": (tiny.llama, {"targets": "all-linear"}, {}),
    "llama sharded": (tiny.llama, {"targets": "all-linear"}, {"max_shard_size": "6KB"}),
    "llama head and embedding": (
        tiny.llama,
        {"targets": ["lm_head", "embed_tokens", "q_proj"]},
        {"max_shard_size": "6KB"},
    ),
    "llama rank patterns": (
        tiny.llama,
        {"targets": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 5}, "rslora": True},
        {},
    ),
    "llama tied": (lambda: tiny.llama(tied=True), {"targets": "all-linear"}, {}),
    "llama saved norm": (tiny.llama, {"targets": ["v_proj"], "save_modules": ["norm"]}, {"max_shard_size": "6KB"}),
    "gpt2": (tiny.gpt2, {"targets": "all-linear"}, {}),
    "gpt2 square Conv1D": (tiny.gpt2, {"targets": ["attn.c_proj"]}, {}),
    "gpt2 packed": (tiny.gpt2, {"targets": ["c_attn"], "packed": {"c_attn": [True, False, True]}}, {}),
    "gpt2 biases": (tiny.gpt2, {"targets": ["c_attn"], "bias": "all"}, {}),
    "bert with its head": (
        tiny.bert,
        {"targets": ["query", "value"], "save_modules": ["classifier"], "task": "SEQ_CLS"},
        {},
    ),
    "bert word embeddings": (tiny.bert, {"targets": ["word_embeddings"]}, {}),
    "t5": (tiny.t5, {"targets": ["q", "wo"]}, {"max_shard_size": "12KB"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_merged_folder_computes_what_the_attached_adapter_computes(kind, tmp_path):
    make, config, options = MODELS[kind]
    model = make()
    save(model, tmp_path / "base", **options)
    plain = logits(model)
    adapter = trained(model, **config)
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-3
    adapter.save(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), expected, atol=1e-5, rtol=0)
    assert len(report.targets) == len(adapter.factors)
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir() if p.name != "lorakit_merge.json"
    )
    assert not report.added
    assert set(report.replaced) == set(adapter.saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_of_the_live_merge_in_every_precision(dtype, tmp_path):
    model = tiny.llama(dtype=dtype)
    save(model, tmp_path / "base")
    adapter = trained(model, targets="all-linear")
    lk.merge(model)
    expected = dict(lk.detach(model, merged="keep").state_dict().items())
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    written = weights(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == dtype
        torch.testing.assert_close(written[name], tensor, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    "make,targets", [(tiny.llama, ["q_proj", "down_proj"]), (tiny.gpt2, ["c_attn", "c_proj", "c_fc"])]
)
def test_weights_equal_pefts_merge_and_unload(make, targets, tmp_path):
    import peft

    model = make()
    save(model, tmp_path / "base", max_shard_size="8KB")
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, fan_in_fan_out=make is tiny.gpt2, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_base_stays_as_it_was_and_untouched_tensors_are_its_bytes(tmp_path):
    model = tiny.llama(dtype=torch.bfloat16)
    save(model, tmp_path / "base", max_shard_size="4KB")
    before = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    merge_checkpoint(tmp_path / "base", trained(model, targets=["q_proj"]), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == before
    old, new = weights(tmp_path / "base"), weights(tmp_path / "out")
    differ = {n for n in old if not torch.equal(old[n].view(torch.int16), new[n].view(torch.int16))}
    assert differ == {n for n in old if n.endswith("q_proj.weight")}
    assert old.keys() == new.keys()


def test_conv_embedding_and_linear_merge_in_any_folder_of_safetensors(tmp_path):
    for model, targets in (
        (tiny.cnn(groups=2), ["conv1", "conv2", "conv2_circular", "conv3"]),
        (tiny.embedder(), ["emb", "head"]),
    ):
        base = tmp_path / type(model).__name__
        base.mkdir()
        save_file(model.state_dict(), base / "model.safetensors")
        (base / "config.json").write_text("{}")
        adapter = trained(model, targets=targets)
        expected = logits(model)
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
        lk.detach(model)
        model.load_state_dict(weights(tmp_path / "out"))
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_square_conv1d_merges_right_without_the_flag(tmp_path):
    model = tiny.gpt2()
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["attn.c_proj"])
    unset = replace(adapter, updates={m: replace(f, transposed=False) for m, f in adapter.factors.items()})
    merge_checkpoint(tmp_path / "base", unset, tmp_path / "out")
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------- names


def test_gpt2_files_without_the_models_prefix_are_found(tmp_path):
    model = tiny.gpt2()
    save(model, tmp_path / "base")
    rename_tensors(tmp_path / "base", lambda n: n.removeprefix("transformer."))
    merge_checkpoint(tmp_path / "base", trained(model, targets=["c_attn", "wpe"]), tmp_path / "out")
    assert "h.0.attn.c_attn.weight" in weights(tmp_path / "out")
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "old,new", [("model.", "language_model.model."), ("model.", "model.language_model."), ("model.", "")]
)
def test_one_prefix_exchanged_for_all_modules_is_found(old, new, tmp_path):
    model = tiny.llama()
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj", "embed_tokens"])
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "plain")
    rename_tensors(tmp_path / "base", lambda n: new + n.removeprefix(old) if n.startswith(old) else n)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    found = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(found[new + name.removeprefix(old) if name.startswith(old) else name], tensor)


# ---------------------------------------------------------------------------------- saved weights


def test_head_that_the_base_lacks_is_added_and_reported(tmp_path):
    torch.manual_seed(1)
    save(tiny.llama(), tmp_path / "base", max_shard_size="6KB")
    kind = transformers.LlamaForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0).eval()
    adapter = trained(model, targets=["q_proj"], save_modules=["score"])
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert report.added == ("score.weight",)
    assert "LlamaForSequenceClassification" in report.warnings[0]
    merged = kind.from_pretrained(tmp_path / "out", num_labels=3, pad_token_id=0).eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)


def test_added_weight_and_sizes_are_in_the_index(tmp_path):
    model = tiny.llama(tied=True)
    save(model, tmp_path / "base", max_shard_size="6KB")
    merge_checkpoint(tmp_path / "base", trained(model, targets=["lm_head"]), tmp_path / "out", untie=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    every = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in every.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in every.values())
    assert index["weight_map"].keys() == every.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


# ---------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_untie_gives_tied_weights_a_tensor_each(targets, tmp_path):
    model = tiny.llama(tied=True)
    save(model, tmp_path / "base")
    adapter = trained(model, targets=targets)
    expected = logits(model)
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    assert report.untied == ("lm_head.weight", "model.embed_tokens.weight")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), expected, atol=1e-5, rtol=0)


def test_untie_works_on_gpt2_files_without_prefix(tmp_path):
    model = tiny.gpt2()
    save(model, tmp_path / "base")
    rename_tensors(tmp_path / "base", lambda n: n.removeprefix("transformer."))
    adapter = trained(model, targets=["lm_head"])
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_untie_holds_where_the_files_store_both_copies(tmp_path):
    model = tiny.llama(tied=True)
    save(model, tmp_path / "base")
    tensors = weights(tmp_path / "base")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    adapter = trained(model, targets=["embed_tokens"])
    with pytest.raises(lk.LorakitError, match="tied"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_tied_weight_saved_whole_stays_tied(tmp_path):
    model = tiny.llama(tied=True)
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj"], save_modules=["embed_tokens"])
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    torch.testing.assert_close(logits(load(model, tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_untie_without_need_changes_nothing(tmp_path):
    model = tiny.llama(tied=True)
    save(model, tmp_path / "base")
    report = merge_checkpoint(tmp_path / "base", trained(model, targets=["q_proj"]), tmp_path / "out", untie=True)
    assert report.untied == ()
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


# ---------------------------------------------------------------------------------- precision, report


def test_dtype_writes_all_weights_in_another_precision(tmp_path):
    model = tiny.llama(dtype=torch.bfloat16)
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj"])
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", dtype=torch.float32)
    assert report.converted
    assert report.dtype == "float32"
    merged = load(model, tmp_path / "out")
    assert merged.dtype == torch.float32
    base = tiny.llama(dtype=torch.bfloat16).float()
    lk.attach(base, adapter)
    torch.testing.assert_close(logits(merged), logits(base), atol=1e-5, rtol=0)


def test_report_measures_what_was_written(tmp_path):
    model = tiny.llama(dtype=torch.bfloat16)
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj", "up_proj"])
    seen: list[tuple[str, int, int]] = []
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", on_tensor=lambda *step: seen.append(step))
    old, new = weights(tmp_path / "base"), weights(tmp_path / "out")
    for target in report.targets:
        apart = (new[target.tensor].float() - old[target.tensor].float()).abs()
        assert target.applied == apart.max().item()
        assert target.changed == pytest.approx((apart > 0).float().mean().item())
        assert target.asked == pytest.approx(adapter.factors[target.module].delta().abs().max().item(), rel=1e-5)
    assert report.largest == max(t.applied for t in report.targets)
    assert report.bytes == sum(t.nbytes for t in new.values())
    assert report.untouched == len(old) - 4
    assert [step[1:] for step in seen] == [(i + 1, 2 * len(old)) for i in range(2 * len(old))]
    json.dumps(report.to_dict())
    (each,) = tables(report, every_module=True)
    assert [row[0] for row in each.cells] == [target.module for target in report.targets]
    (kinds,) = tables(report)
    assert sorted(row[:2] for row in kinds.cells) == [["mlp.up_proj", "2"], ["self_attn.q_proj", "2"]]
    assert "4 targets merged" in json.loads((tmp_path / "out" / "lorakit_merge.json").read_text())["merged"]


def test_update_below_the_precision_is_a_warning_and_all_of_them_an_error(tmp_path):
    model = tiny.llama(dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.fill_(1.0)
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj", "v_proj"])
    small = {m: replace(f, B=f.B * 1e-4) if "q_proj" in m else f for m, f in adapter.factors.items()}
    report = merge_checkpoint(tmp_path / "base", replace(adapter, updates=small), tmp_path / "out")
    assert [t.module for t in report.targets if t.below_precision] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert len(report.warnings) == 2
    assert "below its weight's precision" in report.warnings[0]
    only = {m: f for m, f in small.items() if "q_proj" in m}
    with pytest.raises(lk.LorakitError, match="no weight changed"):
        merge_checkpoint(tmp_path / "base", replace(adapter, updates=only), tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    merge_checkpoint(tmp_path / "base", replace(adapter, updates=only), tmp_path / "lost", dtype=torch.float32)


def test_other_files_are_copied_and_other_weights_left_out(tmp_path):
    base = save(tiny.llama(), tmp_path / "base")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer.model",
        "code/modeling.py",
        "1_Pooling/config.json",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in (
        "pytorch_model.bin",
        "model.Q4.gguf",
        "original/params.json",
        "nested/adapter_config.json",
        "nested/a.json",
        ".git/HEAD",
        "model.fp16.safetensors",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge_checkpoint(base, trained(tiny.llama(), targets=["q_proj"]), tmp_path / "out")
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert there == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "lorakit_merge.json",
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer.model",
        "code/modeling.py",
        "1_Pooling/config.json",
    }
    assert set(report.left_out) == {
        "pytorch_model.bin",
        "model.Q4.gguf",
        "original/params.json",
        "nested/adapter_config.json",
        "nested/a.json",
        "model.fp16.safetensors",
    }


PEAK = """
import sys, torch
from pathlib import Path
from lorakit.checkpoint import merge_checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith(key)).split()[1]) / 1024

import lorakit, lorakit.formats.peft
adapter = lorakit.Adapter.load(sys.argv[2])
torch.randn(64, 64) @ torch.randn(64, 64)
before = status("VmHWM")
merge_checkpoint(sys.argv[1], adapter, sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_a_few_blocks_and_not_one_tensor(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    # 128 MB each
    save_file({"a.weight": torch.zeros(4096, 8192), "b.weight": torch.zeros(4096, 8192)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    factors = {"a": lk.Factors(torch.ones(2, 8192), torch.ones(4096, 2), 2.0)}
    known = {
        "fingerprint": fingerprint({"a.weight": torch.zeros(4096, 8192), "b.weight": torch.zeros(4096, 8192)}, "None")
    }
    lk.Adapter(lk.LoraConfig(rank=2, targets=["a"]), factors, metadata=known).save(tmp_path / "adapter")
    child = subprocess.run(
        [sys.executable, "-c", PEAK, base, tmp_path / "adapter", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(child.stdout) < 100, "MB beyond what stood before; one tensor is 128 MB"


def test_a_variant_becomes_the_folders_weights(tmp_path):
    model = tiny.llama(dtype=torch.float16)
    save(model, tmp_path / "base", variant="fp16", max_shard_size="6KB")
    merge_checkpoint(tmp_path / "base", trained(model, targets=["q_proj"]), tmp_path / "out")
    assert not [p.name for p in (tmp_path / "out").iterdir() if "fp16" in p.name]
    torch.testing.assert_close(
        logits(load(model, tmp_path / "out")), logits(model), atol=TOLERANCE[torch.float16], rtol=0
    )


def test_the_precision_is_said_in_configs_within_the_config_too(tmp_path):
    model = tiny.llama()
    adapter = trained(model, targets=["q_proj"])
    save(tiny.llama(), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"text_config": {"dtype": "float32", "hidden_size": 16}})
    )
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", dtype=torch.bfloat16, force_base=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == {
        "dtype": "bfloat16",
        "hidden_size": 16,
    }


def test_a_head_that_the_adapter_replaces_is_not_compared_with_the_bases(tmp_path):
    model = tiny.llama()
    save(model, tmp_path / "base")
    adapter = trained(model, targets=["q_proj"])
    name = next(iter(adapter.metadata["fingerprint"]["samples"]))
    samples = {n: [9.0] * len(v) if n == name else v for n, v in adapter.metadata["fingerprint"]["samples"].items()}
    metadata = {**adapter.metadata, "fingerprint": {**adapter.metadata["fingerprint"], "samples": samples}}
    with pytest.raises(lk.errors.AdapterError, match="another base"):
        merge_checkpoint(tmp_path / "base", replace(adapter, metadata=metadata), tmp_path / "out")
    whole = weights(tmp_path / "base")[name] + 1
    merge_checkpoint(tmp_path / "base", replace(adapter, metadata=metadata, saved={name: whole}), tmp_path / "out")
