"""`--fix` with a base: what a receiver does not accept is merged into a copy of it, and copy + rest equal base +
adapter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import logits, randomise_factors

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError
from lorakit.export import export, findings, into_base


@pytest.fixture
def base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter():
    model = lk.attach(
        tiny.llama(), lk.LoraConfig(rank=8, alpha=16, targets=["q_proj", "down_proj"], save_modules=["norm"])
    )
    value = lk.capture(randomise_factors(model))
    saved = {name: tensor * 1.5 for name, tensor in value.saved.items()}
    dora = "model.layers.1.mlp.down_proj"
    f = value.factors[dora]
    factors = {**value.factors, dora: Dora(f, torch.rand(f.B.shape[0], 1) + 0.5)}
    return replace(value, saved=saved, updates=factors)


def plain(adapter):
    return dict(adapter.factors)


def test_copy_plus_rest_equals_base_plus_adapter(base, adapter, tmp_path):
    merge_checkpoint(base, adapter, tmp_path / "merged")
    expected = logits(type(tiny.llama()).from_pretrained(tmp_path / "merged").eval())
    done = export(adapter, tmp_path / "out", "vllm", fix=True, verify=True, base=base)
    assert done.base == tmp_path / "out-base"
    assert "2 modules and weights that vllm does not accept" in done.mended[0]
    assert done.logits is not None
    rest = lk.Adapter.load(tmp_path / "out")
    assert len(rest.factors) == 3
    assert not rest.saved
    model = type(tiny.llama()).from_pretrained(done.base).eval()
    # with its fingerprint, of the copy
    torch.testing.assert_close(logits(lk.attach(model, rest)), expected, atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["modules_to_save"], config["use_dora"]) == (
        str(done.base),
        None,
        False,
    )


def test_without_the_base_the_refusal_suggests_it(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"saved weights(.|\n)*--fix with --base FOLDER does it"):
        export(adapter, tmp_path / "out", "sglang", fix=True)
    with pytest.raises(AdapterError, match="--merged --base FOLDER merges base and adapter into one GGUF"):
        export(adapter, tmp_path / "out.gguf", "llama.cpp", fix=True, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_nothing_is_written_if_nothing_is_left_or_the_copy_exists(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match="merging this would leave nothing"):
        export(replace(adapter, updates={}), tmp_path / "out", "sglang", fix=True, base=base)
    (tmp_path / "out-base").mkdir()
    with pytest.raises(LorakitError, match="out-base exists"):
        export(adapter, tmp_path / "out", "sglang", fix=True, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out-base"]
    assert export(adapter, tmp_path / "out", "sglang", fix=True, base=base, force=True).base == tmp_path / "out-base"


def test_the_command_prints_how_to_serve_the_copy(base, adapter, tmp_path, capsys):
    from lorakit.cli import run

    replace(adapter, updates=plain(adapter)).save(tmp_path / "adapter")
    assert (
        run(
            [
                "export",
                str(tmp_path / "adapter"),
                str(tmp_path / "out"),
                "--for",
                "sglang",
                "--fix",
                "--verify",
                "--base",
                str(base),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "fixed: 1 modules and weights that sglang does not accept: merged into" in out
    assert f"--model-path {tmp_path / 'out-base'}" in out.splitlines()[-1]
    assert (
        f"logits through {tmp_path / 'out-base'} with {tmp_path / 'out'}, against {base} with the adapter: the largest"
        in out
    )


def test_the_fixed_adapter_is_what_is_written(base, tmp_path):
    model = lk.attach(
        tiny.llama(), lk.LoraConfig(rank=7, alpha=5, rslora=True, targets=["q_proj"], save_modules=["norm"])
    )
    value = lk.capture(randomise_factors(model))
    value = replace(value, saved={name: tensor * 1.5 for name, tensor in value.saved.items()})
    for receiver in ("vllm", "sglang"):
        out = tmp_path / receiver
        done = export(value, out, receiver, fix=True, verify=True, base=base)
        assert findings(lk.Adapter.load(out), receiver) == []
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["use_rslora"]) == (8 if receiver == "vllm" else 7, False)
        assert done.logits.relative < 1e-5


def damaged(name, change, monkeypatch):
    """Make `Split.write` write a different part."""
    write = into_base.Split.write
    monkeypatch.setattr(
        into_base.Split, "write", lambda self, rest, path: write(replace(self, **{name: change(self)}), rest, path)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_compared_with_the_full_adapter_on_the_original_base(adapter, tmp_path, monkeypatch, dtype):
    tiny.llama().to(dtype).save_pretrained(tmp_path / "base")
    plain = replace(adapter, updates=adapter.factors)
    name, f = next(iter(adapter.factors.items()))
    whole = replace(adapter, updates={**adapter.updates, name: Dense(f.delta())})
    for value, live in ((plain, True), (adapter, True), (whole, False)):  # a whole update cannot be attached
        done = export(value, tmp_path / "out", "vllm", fix=True, verify=True, base=tmp_path / "base", force=True)
        assert done.logits.live == live
        assert done.logits.relative < {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
        assert done.logits.moved > 0.1 * done.logits.largest
    damaged("part", lambda s: replace(s.part, saved={n: t * 30 for n, t in s.part.saved.items()}), monkeypatch)
    with pytest.raises(
        AdapterError, match=r"gives different logits through .*other-base, against .*base with the adapter: off by"
    ):
        export(plain, tmp_path / "other", "vllm", fix=True, verify=True, base=tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "out-base"]


def test_format_errors_come_before_the_base_is_copied(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(into_base, "merge_checkpoint", lambda *_: pytest.fail("the base was copied"))
    plain = replace(adapter, updates=adapter.factors)
    with pytest.raises(AdapterError, match="kohya"):
        export(plain, tmp_path / "x.safetensors", "comfyui", fix=True, base=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("where", ["save", "compare", "write_text", "_move"])
def test_an_error_at_any_point_leaves_existing_files_unchanged(base, adapter, tmp_path, monkeypatch, where):
    def fails(*_, **more):
        raise LorakitError("the disk is full")

    staging = sys.modules["lorakit.io.staging" if where == "_move" else "lorakit.export.staging"]
    if where == "write_text":
        staging, where = sys.modules["lorakit.formats.peft"], "write_text"
    options = {"fix": True, "verify": True, "base": base, "force": True}
    with monkeypatch.context() as patched:
        patched.setattr(staging, where, fails)
        with pytest.raises(LorakitError, match="the disk is full"):
            export(adapter, tmp_path / "out", "vllm", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    export(adapter, tmp_path / "out", "vllm", **options)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert tmp_path / "out-base" / "model.safetensors" in before
    with monkeypatch.context() as patched:
        patched.setattr(staging, where, fails)
        with pytest.raises(LorakitError, match="the disk is full"):
            export(
                replace(adapter, saved={n: t * 2 for n, t in adapter.saved.items()}),
                tmp_path / "out",
                "vllm",
                **options,
            )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "out-base"]


def test_errors_name_the_requested_paths(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["lorakit.export.staging"].verify, "TOLERANCE", -1)
    with pytest.raises(AdapterError, match=rf"^{tmp_path / 'out'}, read back, differs from the adapter"):
        export(adapter, tmp_path / "out", "vllm", fix=True, verify=True, base=base)


def test_the_copy_of_a_single_file_is_a_single_file(adapter, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for base, out, copy in (
        ("model.safetensors", "out", "out-base.safetensors"),
        ("model.safetensors", "x.safetensors", "x-base.safetensors"),
        ("folder", "out", "out-base"),
    ):
        made = into_base.split(adapter, list(adapter.saved), tmp_path / base, tmp_path / out, force=False)
        assert made.copy == tmp_path / copy
        assert (made.part.saved, made.rest.saved) == (adapter.saved, {})


def test_a_folder_that_contains_the_source_is_never_replaced(base, adapter, tmp_path, capsys):
    from lorakit.cli import run

    merge_checkpoint(base, replace(adapter, saved={}), tmp_path / "out-base")
    replace(adapter, updates=plain(adapter)).save(tmp_path / "out-base" / "adapter")
    before = (tmp_path / "out-base" / "adapter" / "adapter_model.safetensors").read_bytes()
    call = [
        "export",
        str(tmp_path / "out-base" / "adapter"),
        str(tmp_path / "out"),
        "--for",
        "vllm",
        "--fix",
        "--base",
        str(base),
        "--force",
    ]
    assert run(call) == 1
    assert "holds the adapter itself" in capsys.readouterr().err
    assert (tmp_path / "out-base" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_missing_folders_are_created(base, adapter, tmp_path):
    done = export(adapter, tmp_path / "new" / "deep" / "out", "vllm", fix=True, base=base)
    assert done.base == tmp_path / "new" / "deep" / "out-base"
    assert (done.base / "config.json").is_file()


def test_a_blocked_file_name_is_reported_before_anything_is_replaced(base, adapter, tmp_path):
    export(adapter, tmp_path / "out", "vllm", fix=True, base=base)
    (tmp_path / "out" / "lorakit.json").unlink()
    (tmp_path / "out" / "lorakit.json").mkdir()
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(LorakitError, match="a folder has that name"):
        export(
            2.0 * replace(adapter, saved={}, updates=plain(adapter)),
            tmp_path / "out",
            "vllm",
            fix=True,
            verify=True,
            base=base,
            force=True,
        )
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_saved_head_of_a_tied_model_is_untied_in_the_copy(tmp_path):
    tiny.llama(tied=True).save_pretrained(tmp_path / "tied")
    model = lk.attach(tiny.llama(tied=True), lk.LoraConfig(rank=8, alpha=16, targets=["q_proj"]))
    value = lk.capture(randomise_factors(model))
    lk.detach(model)
    whole = replace(value, saved={"lm_head.weight": torch.randn(tiny.VOCAB, 16)})
    done = export(whole, tmp_path / "out", "sglang", fix=True, base=tmp_path / "tied")
    assert json.loads((done.base / "config.json").read_text())["tie_word_embeddings"] is False
