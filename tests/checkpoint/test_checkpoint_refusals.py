"""Merging into checkpoint folders: what does not fit is refused with the reason, and no half-written folder is ever
left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import randomise_factors

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError, TargetError
from lorakit.io.stream import read_header


@pytest.fixture
def base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    return tmp_path / "base"


def adapter_for(model, **config) -> lk.Adapter:
    lk.attach(model, lk.LoraConfig(**{"rank": 3, "targets": ["q_proj"], **config}))
    return lk.capture(randomise_factors(model))


@pytest.fixture
def adapter():
    return adapter_for(tiny.llama())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def refused(kind, match, base, adapter, out, **options):
    """The merge raises, and beside OUT's parent nothing new is left."""
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(kind, match=match):
        merge_checkpoint(base, adapter, out, **options)
    assert sorted(p.name for p in out.parent.iterdir()) == before


# ---------------------------------------------------------------------------------- OUT


def test_existing_out_is_refused_unless_forced(base, adapter, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(base, adapter, out)
    (out / "old.txt").write_text("old")
    refused(LorakitError, "exists\n.*--force", base, adapter, out)
    assert (out / "old.txt").exists()
    merge_checkpoint(base, adapter, out, force=True)
    assert not (out / "old.txt").exists()
    assert (out / "lorakit_merge.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_force_replaces_checkpoints_and_nothing_else(base, adapter, tmp_path):
    letters, note, pipe = tmp_path / "letters", tmp_path / "note", tmp_path / "pipe"
    letters.mkdir()
    (letters / "dear.txt").write_text("friend")
    (letters / "config.json").write_text("{}")  # of something else
    note.write_text("mine")
    os.mkfifo(pipe)
    for out, said in (
        (letters, "holds no checkpoint, but config.json, dear.txt"),
        (note, "is a file"),
        (pipe, "is a file"),
    ):
        with pytest.raises(LorakitError, match=said):
            merge_checkpoint(base, adapter, out, force=True)
    assert (letters / "dear.txt").read_text() == "friend"
    assert note.read_text() == "mine"
    assert pipe.is_fifo()


@pytest.mark.parametrize("where", ["base", ".", "base/merged", "link"])
def test_out_that_is_or_holds_or_lies_in_the_base_is_refused(where, base, adapter, tmp_path):
    (tmp_path / "link").symlink_to(base)
    before = snapshot(base)
    with pytest.raises(LorakitError, match="the base"):
        merge_checkpoint(base, adapter, tmp_path / where, force=True)
    assert snapshot(base) == before


def test_out_that_holds_the_adapter_is_refused(base, adapter, tmp_path):
    adapter.save(tmp_path / "run" / "adapter")
    with pytest.raises(LorakitError, match="holds the adapter"):
        merge_checkpoint(base, tmp_path / "run" / "adapter", tmp_path / "run", force=True)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("at", [1, 5, 30])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_merge_leaves_nothing_or_the_old_folder(at, error, base, adapter, tmp_path):
    def stop(name, done, total):
        if done == at:
            raise error("stop")

    refused(error, "stop", base, adapter, tmp_path / "out", on_tensor=stop)
    merge_checkpoint(base, adapter, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    refused(error, "stop", base, adapter, tmp_path / "out", on_tensor=stop, force=True)
    assert snapshot(tmp_path / "out") == before


KILLED = """
import sys, time
from lorakit.checkpoint import merge_checkpoint

def slow(name, done, total):
    if done == int(sys.argv[4]):
        print("now", flush=True)
        time.sleep(60)

merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], on_tensor=slow)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("at", [3, 30])
def test_killed_merge_leaves_no_out_and_the_next_one_works(at, base, adapter, tmp_path):
    adapter.save(tmp_path / "adapter")
    before = snapshot(base)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, base, tmp_path / "adapter", tmp_path / "out", str(at)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert snapshot(base) == before
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_full_disk_is_noticed_before_anything_is_written(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    refused(LorakitError, r"the disk has 0.00 GB free; .*\n  free some space", base, adapter, tmp_path / "out")


def test_a_second_merge_into_the_same_out_is_refused(base, adapter, tmp_path):
    said = []

    def second(name, done, total):
        if done == 3:
            with pytest.raises(LorakitError, match=r"/out is being written by process \d+\n  wait until") as error:
                merge_checkpoint(base, adapter, tmp_path / "out")
            said.append(error)

    merge_checkpoint(base, adapter, tmp_path / "out", on_tensor=second)
    assert said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_equal_merges_write_equal_files(base, adapter, tmp_path):
    for name in ("a", "b"):
        adapter.save(tmp_path / name / "adapter")
        merge_checkpoint(base, [tmp_path / name / "adapter"] * 2, tmp_path / name / "out", weights=[0.5, 1])
    assert snapshot(tmp_path / "a" / "out") == snapshot(tmp_path / "b" / "out")
    assert str(tmp_path) not in (tmp_path / "a" / "out" / "lorakit_merge.json").read_text()


# ---------------------------------------------------------------------------------- the base


def test_missing_folder_suggests_its_neighbour(base, adapter, tmp_path):
    refused(LorakitError, "did you mean 'base'", tmp_path / "bass", adapter, tmp_path / "out")


def test_folder_that_is_an_adapter_is_told_so(base, adapter, tmp_path):
    adapter.save(tmp_path / "adapter")
    refused(LorakitError, "it holds an adapter", tmp_path / "adapter", adapter, tmp_path / "out")


def test_pickled_checkpoint_is_refused_with_how_to_convert(base, adapter, tmp_path):
    for file in base.glob("model*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    refused(LorakitError, "save_pretrained", base, adapter, tmp_path / "out")


def test_folder_without_weights_names_what_it_has(base, adapter, tmp_path):
    for file in base.glob("model*"):
        file.unlink()
    (base / "model.gguf").write_bytes(b"")
    refused(LorakitError, "no weights.*model.gguf", base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "how", [{"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {"bits": 4}}}]
)
def test_quantized_base_is_refused(how, base, adapter, tmp_path):
    edit_config(base, **how)
    refused(LorakitError, "quantized", base, adapter, tmp_path / "out")


def test_integer_weights_are_refused(adapter, tmp_path):
    tensors = {f"{m}.weight": torch.zeros(16, 16, dtype=torch.int8) for m in adapter.factors}
    refused(
        LorakitError,
        r"stored as I8 \(quantized",
        single(tmp_path / "base", tensors),
        adapter,
        tmp_path / "out",
        force_base=True,
    )


def test_missing_shard_is_named(base, adapter, tmp_path):
    next(base.glob("model-00002*")).unlink()
    refused(LorakitError, "incomplete.*model-00002", base, adapter, tmp_path / "out")


def test_index_may_not_point_outside_the_folder(base, adapter, tmp_path):
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(LorakitError, "files of the same folder", base, adapter, tmp_path / "out")


def test_cut_off_shard_is_named(base, adapter, tmp_path):
    shard = next(base.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(
        LorakitError, "model-00002.*is not a sound safetensors file.*would end at byte", base, adapter, tmp_path / "out"
    )


# ---------------------------------------------------------------------------------- the adapter and the base


def test_adapter_of_another_model_names_the_missing_target_and_the_nearest_tensors(base, adapter, tmp_path):
    other = replace(adapter, updates={m.replace("q_proj", "q_prok"): f for m, f in adapter.factors.items()})
    refused(
        TargetError,
        r"layers\.0\.self_attn\.q_prok(.|\n)*nearest.*layers\.0\.self_attn\.q_proj\.weight",
        base,
        other,
        tmp_path / "out",
    )


def test_one_missing_target_of_many_is_an_error(base, adapter, tmp_path):
    one = next(iter(adapter.factors.values()))
    more = replace(adapter, updates={**adapter.factors, "model.layers.7.self_attn.q_proj": one})
    refused(TargetError, "1 of the adapter's 3 weights", base, more, tmp_path / "out")


def test_prefix_that_fits_two_towers_is_an_error(adapter, tmp_path):
    tensors = {
        f"{tower}.{m.removeprefix('model.')}.weight": torch.zeros(16, 16)
        for m in adapter.factors
        for tower in ("text", "vision")
    }
    refused(
        TargetError,
        r"could be several(.|\n)*text\.layers(.|\n)*vision\.layers",
        single(tmp_path / "base", tensors),
        adapter,
        tmp_path / "out",
        force_base=True,
    )


def test_two_changes_of_one_weight_are_an_error(base, adapter, tmp_path):
    module, factors = next(iter(adapter.factors.items()))
    saved = replace(adapter, saved={f"{module}.weight": factors.delta()})
    refused(AdapterError, "twice", base, saved, tmp_path / "out")
    tensors = {f"{m.removeprefix('model.')}.weight": torch.zeros(16, 16) for m in adapter.factors}
    double = replace(adapter, updates={**adapter.factors, module.removeprefix("model."): factors})
    refused(AdapterError, "twice", single(tmp_path / "short", tensors), double, tmp_path / "out", force_base=True)


def test_adapter_of_another_size_is_an_error_with_both_shapes(adapter, tmp_path):
    tensors = {f"{m}.weight": torch.zeros(32, 32) for m in adapter.factors}
    refused(
        AdapterError,
        r"\[32, 32\](.|\n)*\[16, 16\]",
        single(tmp_path / "base", tensors),
        adapter,
        tmp_path / "out",
        force_base=True,
    )


def test_conv_factors_that_no_weight_can_hold_are_refused(tmp_path):
    factors = {"conv": lk.Factors(torch.ones(4, 4, 3), torch.ones(6, 2, 1), 2.0, "conv", groups=2)}
    base = single(tmp_path / "base", {"conv.weight": torch.zeros(6, 2, 3)})
    refused(
        AdapterError, "keep this adapter unmerged", base, lk.Adapter(lk.LoraConfig(rank=4), factors), tmp_path / "out"
    )


def test_adapter_that_was_never_trained_is_an_error(base, tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"]))
    refused(AdapterError, "zero everywhere", base, lk.capture(model), tmp_path / "out")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_tied_targets_are_refused_with_the_way_out(targets, tmp_path):
    model = tiny.llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    refused(TargetError, "tied(.|\n)*--untie", tmp_path / "base", adapter_for(model, targets=targets), tmp_path / "out")


def test_tied_weight_saved_whole_for_the_head_alone_is_refused_unless_untied(adapter, tmp_path):
    tiny.llama(tied=True).save_pretrained(tmp_path / "base")
    head = torch.randn(tiny.VOCAB, 16)
    head_only = replace(adapter, saved={"lm_head.weight": head})
    refused(TargetError, "tied(.|\n)*--untie", tmp_path / "base", head_only, tmp_path / "out", force_base=True)
    merge_checkpoint(tmp_path / "base", head_only, tmp_path / "out", untie=True, force_base=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], head)
    assert torch.equal(
        written["model.embed_tokens.weight"],
        load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"],
    )


def test_encoder_decoder_cannot_be_untied(tmp_path):
    model = tiny.t5()
    model.save_pretrained(tmp_path / "base")
    refused(
        LorakitError,
        "encoder-decoder",
        tmp_path / "base",
        adapter_for(model, targets=["lm_head"]),
        tmp_path / "out",
        untie=True,
    )


def test_head_missing_from_an_untied_base_is_not_taken_for_tied(base, tmp_path):
    model = tiny.llama()
    adapter = adapter_for(model, targets=["lm_head"])
    tensors = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items() if n != "lm_head.weight"}
    for file in base.glob("model*"):
        file.unlink()
    save_file(tensors, base / "model.safetensors")
    refused(TargetError, "lm_head(.|\n)*another model", base, adapter, tmp_path / "out", untie=True)


def test_saved_bias_that_the_base_lacks_is_an_error_and_not_a_new_weight(base, adapter, tmp_path):
    biased = replace(adapter, saved={"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)})
    refused(TargetError, "q_proj.bias.*has only", base, biased, tmp_path / "out")


def test_saved_weight_of_another_size_is_an_error_that_speaks_of_resizing(base, adapter, tmp_path):
    resized = replace(adapter, saved={"model.embed_tokens.weight": torch.zeros(tiny.VOCAB + 2, 16)})
    refused(AdapterError, "resize", base, resized, tmp_path / "out")


def test_base_with_other_weights_is_refused_unless_forced(adapter, tmp_path):
    torch.manual_seed(5)
    model = tiny.llama()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    refused(AdapterError, "another base(.|\n)*--force-base", tmp_path / "base", adapter, tmp_path / "out")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", force_base=True)


def test_same_base_in_another_precision_and_under_other_names_is_the_same_base(adapter, tmp_path):
    tiny.llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    with torch.no_grad():
        tensors = load_file(file)
        tensors["layers.1.self_attn.v_proj.weight"].normal_()
    save_file(tensors, file, {"format": "pt"})
    refused(AdapterError, "another base", tmp_path / "base", adapter, tmp_path / "out2")


@pytest.mark.parametrize("broken", ["x", {"samples": 3}, {"samples": {"lm_head.weight": "x"}}])
def test_damaged_fingerprint_is_an_error_and_no_crash(broken, base, adapter, tmp_path):
    damaged = replace(adapter, metadata={"fingerprint": broken})
    refused(AdapterError, "fingerprint(.|\n)*--force-base", base, damaged, tmp_path / "out")
    merge_checkpoint(base, damaged, tmp_path / "out", force_base=True)


def test_overflow_in_half_precision_is_an_error(base, adapter, tmp_path):
    huge = replace(adapter, updates={m: replace(f, B=f.B * 1e7) for m, f in adapter.factors.items()})
    refused(LorakitError, "too large for torch.float16", base, huge, tmp_path / "out", dtype=torch.float16)


def test_dtype_must_be_a_floating_point_type(base, adapter, tmp_path):
    refused(LorakitError, "expected torch.bfloat16", base, adapter, tmp_path / "out", dtype=torch.int8)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_damage_between_writing_and_reading_back_is_noticed(name, dtype, base, adapter, tmp_path):
    """A bit of an updated, a copied and a replaced tensor flipped on disk after all were written."""

    def flip(_, done, total):
        if done == total // 2:
            found = [
                s[name] for f in tmp_path.glob(".out.writing/new/out/*.safetensors") if name in (s := read_header(f)[0])
            ]
            with open(found[0].path, "rb+") as file:
                file.seek(found[0].start + found[0].nbytes - 1)  # the last number's sign and exponent
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([last ^ 0x40]))

    adapter = replace(adapter, saved={"model.norm.weight": torch.ones(16) * 2})
    refused(LorakitError, f"'{name}'.*does not read back", base, adapter, tmp_path / "out", on_tensor=flip, dtype=dtype)
