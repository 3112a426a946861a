"""`--fix` with the base at hand: what a receiver does not take goes into a copy of the base, and copy + rest do what base + adapter did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import logits, randomise_factors

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError
from lorakit.export import export


@pytest.fixture
def base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter():
    model = lk.attach(tiny.llama(), lk.LoraConfig(rank=8, alpha=16, targets=["q_proj", "down_proj"], save_modules=["norm"]))
    value = lk.capture(randomise_factors(model))
    saved = {name: tensor * 1.5 for name, tensor in value.saved.items()}
    dora = "model.layers.1.mlp.down_proj"
    f = value.factors[dora]
    factors = {**value.factors, dora: replace(f, magnitude=torch.rand(f.B.shape[0], 1) + 0.5)}
    return replace(value, saved=saved, factors=factors)


def test_copy_and_rest_compute_what_base_and_adapter_do(base, adapter, tmp_path):
    merge_checkpoint(base, adapter, tmp_path / "merged")
    expected = logits(type(tiny.llama()).from_pretrained(tmp_path / "merged").eval())
    done = export(adapter, tmp_path / "out", "vllm", fix=True, verify=True, base=base)
    assert done.base == tmp_path / "out-base"
    assert "2 modules and weights that vllm does not take" in done.mended[0]
    assert done.logits is not None
    rest = lk.Adapter.load(tmp_path / "out")
    assert len(rest.factors) == 3
    assert not rest.saved
    model = type(tiny.llama()).from_pretrained(done.base).eval()
    torch.testing.assert_close(logits(lk.attach(model, rest)), expected, atol=1e-5, rtol=1e-4)  # with its fingerprint, of the copy
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["modules_to_save"], config["use_dora"]) == (str(done.base), None, False)


def test_without_the_base_it_is_refused_with_that_way_out(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"saved whole(.|\n)*--fix with --base FOLDER does it"):
        export(adapter, tmp_path / "out", "sglang", fix=True)
    with pytest.raises(AdapterError, match="--merged --base FOLDER writes base and adapter as one GGUF"):
        export(adapter, tmp_path / "out.gguf", "llama.cpp", fix=True, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_where_nothing_would_be_left_or_the_copy_is_in_the_way_nothing_is_written(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match="nothing of this adapter would be left"):
        export(replace(adapter, factors={}), tmp_path / "out", "sglang", fix=True, base=base)
    (tmp_path / "out-base").mkdir()
    with pytest.raises(LorakitError, match="out-base exists"):
        export(adapter, tmp_path / "out", "sglang", fix=True, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out-base"]
    assert export(adapter, tmp_path / "out", "sglang", fix=True, base=base, force=True).base == tmp_path / "out-base"


def test_the_command_names_the_copy_to_serve(base, adapter, tmp_path, capsys):
    from lorakit.cli import run

    plain = replace(adapter, factors={m: replace(f, magnitude=None) for m, f in adapter.factors.items()})
    plain.save(tmp_path / "adapter")
    assert (
        run(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "sglang", "--fix", "--verify", "--base", str(base)]) == 0
    )
    told = capsys.readouterr().out
    assert "mended: 1 modules and weights that sglang does not take: merged into" in told
    assert f"--model-path {tmp_path / 'out-base'}" in told.splitlines()[-1]
