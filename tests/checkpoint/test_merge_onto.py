"""An adapter of a quantized base merges into the base before quantization, if it is that base."""

from __future__ import annotations

import json
import shutil

import pytest
import quantized
import quantized_bases as bases
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.analysis.merge_tables import tables
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import LorakitError


@pytest.fixture(autouse=True)
def _library():
    quantized.library()


@pytest.mark.parametrize("kind", bases.KINDS)
def test_it_is_the_merge_into_the_original_with_a_report_of_what_differs(kind, tmp_path):
    model = bases.load(bases.packed(kind))
    trained_on_it = kind in bases.LIBRARY
    adapter = bases.adapter(0.01, model if trained_on_it else None, targets=["q_proj", "down_proj"])
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", onto=bases.unquantized())
    merge_checkpoint(bases.unquantized(), adapter, tmp_path / "plain")
    out, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert out.keys() == plain.keys()
    assert all(torch.equal(out[name], plain[name]) for name in plain)
    Q, W = bases.dense(kind).state_dict(), quantized.llama().state_dict()
    assert len(report.differences) == 14
    for each in report.differences:
        apart = Q[f"{each.module}.weight"] - W[f"{each.module}.weight"]
        assert each.relative == pytest.approx((apart.norm() / W[f"{each.module}.weight"].norm()).item(), rel=1e-3)
        update = adapter.factors.get(each.module)
        expected = None if update is None else (apart.norm() / update.delta().norm()).item()
        assert each.of_change == (None if expected is None else pytest.approx(expected, rel=1e-3))
    _, table = tables(report)
    worst = max(report.differences, key=lambda d: d.relative)
    assert table.cells[0][:2] == [worst.module, f"{worst.relative:.1%}"]
    assert "the worst 8 of 14" in table.title


def test_a_folder_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "original").mkdir()
    with pytest.raises(LorakitError, match=r"no base '.*orignal'; did you mean 'original'\?\n.*--onto"):
        merge_checkpoint(bases.packed("nf4"), bases.adapter(), tmp_path / "out", onto=tmp_path / "orignal")


def changed(folder, change) -> None:
    """Write a folder's weights again after `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda t: t["model.norm.weight"].mul_(1.5), "'?model.norm.weight holds other values"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].normal_(), r"up_proj' differs by [\d.]+ of its norm"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight' is .128, 64. in the quantized base"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 64)}), r"and there it is \[2, 64\]"),
    ],
)
def test_another_base_is_refused(change, said, tmp_path):
    other = shutil.copytree(bases.unquantized(), tmp_path / "other")
    changed(other, change)
    with pytest.raises(lk.LorakitError, match=f"is not the base that (.|\n)*{said}"):
        merge_checkpoint(bases.packed("nf4"), bases.adapter(targets=["q_proj"]), tmp_path / "out", onto=other)
    assert not (tmp_path / "out").exists()


def test_force_base_merges_anyway(tmp_path):
    other = shutil.copytree(bases.unquantized(), tmp_path / "other")
    changed(other, lambda t: t["model.layers.0.mlp.up_proj.weight"].normal_())
    adapter = bases.adapter(targets=["q_proj"])
    report = merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", onto=other, force_base=True)
    assert max(d.relative for d in report.differences) > 0.9


def test_scales_that_awq_moved_into_the_norms_are_found(tmp_path):
    folder = shutil.copytree(bases.packed("awq"), tmp_path / "awq")
    changed(folder, lambda t: t["model.layers.0.input_layernorm.weight"].mul_(0.5))
    with pytest.raises(lk.LorakitError, match="AWQ moves scales into the norms"):
        merge_checkpoint(folder, bases.adapter(), tmp_path / "out", onto=bases.unquantized())


def test_the_two_folders_are_not_mixed_up(tmp_path):
    adapter = bases.adapter()
    for base, onto, said in (
        (bases.unquantized(), bases.unquantized(), "is not quantized: its adapter merges into it directly"),
        (bases.packed("nf4"), bases.packed("int8"), r"is quantized too \(int8\)"),
    ):
        with pytest.raises(lk.LorakitError, match=said):
            merge_checkpoint(base, adapter, tmp_path / "out", onto=onto)
    for out in (bases.unquantized(), bases.packed("nf4")):
        with pytest.raises(lk.LorakitError, match="is the base itself"):
            merge_checkpoint(bases.packed("nf4"), adapter, out, onto=bases.unquantized(), force=True)
    assert json.loads((bases.unquantized() / "config.json").read_text())["model_type"] == "llama"
