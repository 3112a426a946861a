"""Merged weights quantized again: what the files then hold, what is left of the adapter, and when that is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest
import quantized
import quantized_bases as bases
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.analysis.merge_tables import tables
from lorakit.checkpoint import merge_checkpoint
from lorakit.checkpoint.base import open_base
from lorakit.errors import AdapterError, ConfigError
from lorakit.layers.bases import base_of


@pytest.fixture(autouse=True)
def _library():
    quantized.library()


def read(folder) -> dict[str, torch.Tensor]:
    """All weights of a folder, quantized ones as what they stand for."""
    base = open_base(folder, quantized=True)
    return {n: torch.cat([b.float() for _, b in slot.rows()]).reshape(slot.shape) for n, slot in base.tensors.items()}


@pytest.mark.parametrize("kind", bases.KINDS)
def test_report_is_what_the_equations_say_of_the_written_weights(kind, tmp_path):
    adapter = bases.adapter(targets=["q_proj", "up_proj"])
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", requantize="same", keep_at_least=0)
    before, after = bases.dense(kind).state_dict(), read(tmp_path / "out")
    assert [each.module for each in report.requantized] == [target.module for target in report.targets]
    assert len(report.requantized) == len(adapter.updates)
    for each in report.requantized:
        W, written = (weights[f"{each.module}.weight"].double() for weights in (before, after))
        change = adapter.factors[each.module].delta().double()
        off, kept = (written - W - change).norm(), ((written - W) * change).sum() / change.norm() ** 2
        expected = (off / (W + change).norm(), off / change.norm(), kept)
        for found, value in zip((each.error, each.error_of_change, each.kept), expected, strict=True):
            assert found == pytest.approx(value.item(), rel=1e-3, abs=1e-5)
    changed = {target.tensor for target in report.targets}
    for name, W in before.items():
        if name not in changed:
            torch.testing.assert_close(after[name], W, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", bases.KINDS)
def test_library_loads_the_result_and_computes_the_same(kind, tmp_path):
    base = bases.packed(kind)
    merge_checkpoint(base, bases.adapter(), tmp_path / "out", requantize="same", keep_at_least=0)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    model, dense = bases.load(tmp_path / "out"), quantized.llama()
    dense.load_state_dict(read(tmp_path / "out"))
    assert {name for name, m in model.named_modules() if type(m).__name__ in _CLASSES} == {
        name for name in dict(dense.named_modules()) if name.endswith("proj")
    }
    # int8 rounds activations too when it evaluates
    torch.testing.assert_close(bases.logits(model), bases.logits(dense), atol=1e-2 if kind == "int8" else 1e-5, rtol=0)


_CLASSES = ("Linear4bit", "Linear8bitLt", "GptqLinear", "AwqLinear")


def test_tensors_of_nf4_are_those_of_bitsandbytes_for_the_same_sum(tmp_path):
    adapter, name = bases.adapter(targets=["q_proj"]), "model.layers.0.self_attn.q_proj"
    merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", requantize="same", keep_at_least=0)
    total = bases.dense("nf4").get_submodule(name).weight.detach() + adapter.factors[name].delta()
    expected = {f"{name}.{key}": t for key, t in quantized.linear4(total).state_dict().items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in expected.items():
        if "quant_state" in key:
            assert json.loads(bytes(written[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_pefts_merge_keeps_as_little(kind, tmp_path):
    """Of a ΔW of 1 % of W, both keep a few percent: the step of NF4 is an eighth of the largest weight of a block."""
    import peft

    adapter = bases.adapter(0.004, targets=["q_proj", "up_proj"])
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", requantize="same", keep_at_least=0)
    adapter.save(tmp_path / "adapter")
    model = bases.load(bases.packed(kind))
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    before = bases.dense(kind).state_dict()
    for each in report.requantized:
        module = merged.get_submodule(each.module)
        change = adapter.factors[each.module].delta()
        W = before[f"{each.module}.weight"]
        assert change.norm() < 0.03 * W.norm()
        theirs = ((base_of(module).dense(module).float() - W) * change).sum() / change.norm() ** 2
        assert each.kept == pytest.approx(theirs.item(), abs=0.01)
        assert each.kept < 0.15


@pytest.mark.parametrize("kind", bases.KINDS)
def test_a_small_adapter_is_refused_and_nothing_written(kind, tmp_path):
    adapter = bases.adapter(0.0005 if kind == "int8" else 0.004)
    with pytest.raises(lk.LorakitError) as caught:
        merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", requantize="same")
    message = str(caught.value)
    assert re.search(r"undo the adapter: 1[0-4] of 14 weights keep less than 50% of their ΔW, and nothing", message)
    assert len(re.findall(r"^    model\.layers\.[01]\.\S+: -?\d+\.\d% kept, error [\d.]+ ‖ΔW‖$", message, re.M)) == 3
    ways = ("--onto ORIGINAL", "without --requantize", "--keep-at-least 0")
    assert all(way in message for way in ways)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", bases.KINDS)
def test_from_the_unquantized_base_a_small_adapter_is_kept(kind, tmp_path):
    adapter = bases.adapter(0.01)
    original = bases.unquantized()
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", requantize="same", onto=original)
    shares = [each.kept for each in report.requantized]
    assert min(shares) > 0.5  # of a matrix of 2,048 elements, where chance decides as well
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.15)
    assert len(report.differences) == 14
    merged, tuned, base = bases.load(tmp_path / "out"), quantized.llama(), quantized.llama()
    lk.attach(tuned, adapter)
    direction = (bases.logits(tuned) - bases.logits(base)).flatten()
    moved = (bases.logits(merged) - bases.logits(bases.load(bases.packed(kind)))).flatten()
    assert torch.dot(moved, direction) > 0.7 * torch.dot(direction, direction)
    assert (tmp_path / "out" / "config.json").read_bytes() == (bases.packed(kind) / "config.json").read_bytes()


@pytest.mark.parametrize(
    "kind,to", [(a, b) for a in ("nf4", "int8", "gptq", "awq") for b in ("nf4", "fp4", "int8", "gptq", "awq") if a != b]
)
def test_it_can_be_quantized_in_another_format(kind, to, tmp_path):
    adapter = bases.adapter(targets=["q_proj"])
    report = merge_checkpoint(bases.packed(kind), adapter, tmp_path / "out", requantize=to, keep_at_least=0)
    assert report.dtype == to
    assert len(report.requantized) == 14
    assert sum(each.kept is None for each in report.requantized) == 12
    assert all(each.error < (0.02 if to == "int8" else 0.2) for each in report.requantized)
    dense = quantized.llama()
    dense.load_state_dict(read(tmp_path / "out"))
    model = bases.load(tmp_path / "out")
    assert sum(type(m).__name__ in _CLASSES for m in model.modules()) == 14
    # bitsandbytes computes 4 bits in the compute dtype, bfloat16, and int8 with rounded activations
    torch.testing.assert_close(
        bases.logits(model), bases.logits(dense), atol=1e-2 if to in ("nf4", "fp4", "int8") else 1e-5, rtol=0
    )


def test_merges_are_equal_to_the_byte_and_the_file_is_sound(tmp_path):
    adapter = bases.adapter()
    for name in ("a", "b"):
        merge_checkpoint(bases.packed("nf4-double"), adapter, tmp_path / name, requantize="same", keep_at_least=0)
    first, second = (sorted(p for p in (tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    load_file(tmp_path / "a" / "model.safetensors")


def test_the_tables_list_the_worst_first(tmp_path):
    adapter = bases.adapter()
    report = merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", requantize="same", keep_at_least=0)
    _, table = tables(report)
    shares = [float(row[3].rstrip("%")) for row in table.cells]
    assert shares == sorted(shares)
    assert len(shares) == 8
    assert "14 weights quantized again as nf4" in table.title
    (_, every) = tables(report, every_module=True)
    assert len(every.cells) == 14
    assert json.loads(json.dumps(report.to_dict()))["requantized"][0].keys() == {
        "module",
        "error",
        "error_of_change",
        "kept",
    }


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings,kind,said",
    [
        ({"requantize": "nf5"}, lk.LorakitError, "'nf5' is no kind of quantized weights(.|\n)*did you mean 'nf4'"),
        ({"requantize": "same", "dtype": torch.float32}, ConfigError, "give one of them"),
        ({"requantize": "same", "keep_at_least": 2}, ConfigError, "keep_at_least is 2; expected a share"),
        ({"requantize": "same", "keep_at_least": float("nan")}, ConfigError, "keep_at_least is nan"),
    ],
)
def test_settings_that_cannot_be_followed(settings, kind, said, tmp_path):
    with pytest.raises(kind, match=said):
        merge_checkpoint(bases.packed("nf4"), bases.adapter(), tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_an_unquantized_base_has_nothing_to_quantize_again(tmp_path):
    with pytest.raises(lk.LorakitError, match="not quantized, so there is nothing to quantize again"):
        merge_checkpoint(bases.unquantized(), bases.adapter(), tmp_path / "out", requantize="nf4")


def test_a_full_weight_in_place_of_a_quantized_one_is_refused(tmp_path):
    adapter = bases.adapter(targets=["q_proj"], save_modules=["down_proj"])
    with pytest.raises(AdapterError, match=r"full weight for '.*down_proj.weight', which the base holds quantized"):
        merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out", requantize="same")
    merge_checkpoint(bases.packed("nf4"), adapter, tmp_path / "out")  # as ordinary weights it can be


def test_values_that_the_format_cannot_hold_name_the_module(tmp_path):
    adapter = bases.adapter(2000.0, targets=["q_proj"])
    with pytest.raises(lk.LorakitError, match=r"q_proj' cannot be quantized: (.|\n)*65,504"):
        merge_checkpoint(bases.packed("int8"), adapter, tmp_path / "out", requantize="same", keep_at_least=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind,to", [("nf4", "int8"), ("int8", "nf4"), ("nf4", "gptq"), ("int8", "awq")])
def test_a_tied_head_stays_unquantized_in_another_format(kind, to, tmp_path):
    base = quantized.llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "dense")
    load = {"dtype": "fp32", "device": "cpu"}
    lk.load_base(tmp_path / "dense", quantize=kind, **load).save_pretrained(tmp_path / "packed")
    merge_checkpoint(
        tmp_path / "packed", bases.adapter(targets=["q_proj"]), tmp_path / "out", requantize=to, keep_at_least=0
    )
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in how["llm_int8_skip_modules" if to in ("nf4", "int8") else "modules_to_not_convert"]
    assert to != "nf4" or how["bnb_4bit_compute_dtype"] == "float32"  # the base's precision
    model = lk.load_base(tmp_path / "out", **load)
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(type(m).__name__ in _CLASSES for m in model.modules()) == 14
    base.load_state_dict(read(tmp_path / "out"), strict=False)  # the head's weight is the embedding's
    torch.testing.assert_close(
        bases.logits(model), bases.logits(base), atol=1e-2 if to in ("nf4", "int8") else 1e-5, rtol=0
    )


@pytest.mark.parametrize("onto", [False, True])
def test_rows_that_are_no_whole_blocks_become_ordinary_in_4_bits(onto, tmp_path):
    """The library reads them with the scale of the wrong block, which our own reading could not show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    base.save_pretrained(tmp_path / "dense")
    load = {"dtype": "fp32", "device": "cpu"}
    lk.load_base(tmp_path / "dense", quantize="int8", **load).save_pretrained(tmp_path / "packed")
    adapter = bases.adapter(targets=["q_proj", "down_proj"], model=copy.deepcopy(base))
    settings = {"onto": tmp_path / "dense"} if onto else {}
    report = merge_checkpoint(
        tmp_path / "packed", adapter, tmp_path / "out", requantize="nf4", keep_at_least=0, **settings
    )
    assert len(report.requantized) == 2  # down_proj
    assert any("12 weights are written unquantized" in warning for warning in report.warnings)
    model = lk.load_base(tmp_path / "out", **load)
    assert sum(type(m).__name__ in _CLASSES for m in model.modules()) == 2
    merged = read(tmp_path / "out")
    source = read(tmp_path / ("dense" if onto else "packed"))
    for module, factors in adapter.factors.items():
        W, changed = (weights[f"{module}.weight"] for weights in (source, merged))
        assert (changed - W - factors.delta()).norm() < (0.11 if "down" in module else 0.01) * W.norm()
    base.load_state_dict(merged)
    torch.testing.assert_close(bases.logits(model), bases.logits(base), atol=1e-2, rtol=0)


def test_a_head_that_is_untied_stays_unquantized_too(tmp_path):
    base = quantized.llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "dense")
    load = {"dtype": "fp32", "device": "cpu"}
    lk.load_base(tmp_path / "dense", quantize="nf4", **load).save_pretrained(tmp_path / "packed")
    adapter = bases.adapter(targets=["lm_head"])
    merge_checkpoint(
        tmp_path / "packed", adapter, tmp_path / "out", requantize="int8", keep_at_least=0, untie=True, force_base=True
    )
    head = lk.load_base(tmp_path / "out", **load).lm_head
    assert type(head) is torch.nn.Linear
    expected = base.lm_head.weight + adapter.factors["lm_head"].delta()
    torch.testing.assert_close(head.weight, expected, atol=1e-6, rtol=1e-5)
