"""LoHa, LoKr, VeRA and trained tokens on a base in 4 bits: as on the dequantized weights, in values and gradients."""

from __future__ import annotations

import peft
import pytest
import quantized
import tiny
import torch

import lorakit as lk
from lorakit.analysis.inspect import describe_adapter
from lorakit.errors import StateError
from lorakit.layers.bases import quantized as quantized_modules

LINEARS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "loha": {"variant": "loha", "targets": LINEARS},
    "lokr": {"variant": "lokr", "targets": LINEARS},
    "lokr, both products": {"variant": "lokr", "targets": LINEARS, "lokr_both": True, "lokr_factor": 16},
    "vera": {"variant": "vera", "targets": LINEARS, "rank": 16},
    "tokens": {"variant": "tokens", "targets": ["embed_tokens"], "trainable_tokens": [3, 7, 40]},
    "lora beside tokens": {"targets": LINEARS, "trainable_tokens": [3, 7, 40]},
    "lora beside tokens of both ends": {
        "targets": LINEARS,
        "trainable_tokens": {"embed_tokens": [3, 7], "lm_head": [7, 9]},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    quantized.llama().save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return quantized.in_4_bits(folder)


def config(kind: str) -> lk.LoraConfig:
    scale = {} if kind == "vera" else {"alpha": 8}  # VeRA has none
    return lk.LoraConfig(**{"rank": 4, **scale, **KINDS[kind]})


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dequantized_weights(kind, folder, model):
    dense = quantized.unpacked(folder, model)
    for each in (model, dense):
        tiny.randomise_factors(lk.attach(each, config(kind))).eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense), atol=2e-5, rtol=1e-5)  # without gradients first
    ours, theirs = quantized.gradients(model), quantized.gradients(dense)
    assert set(ours) == set(theirs) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_goes_onto_either_base_and_leaves_every_byte(kind, folder, model, tmp_path):
    before, dense = tiny.bits(model), quantized.unpacked(folder, model)
    tiny.randomise_factors(lk.attach(model, config(kind)))
    y = tiny.logits(model)
    lk.capture(model).save(tmp_path)
    lk.detach(model)
    assert tiny.same_bits(tiny.bits(model), before)
    adapter = lk.Adapter.load(tmp_path)
    assert torch.equal(tiny.logits(lk.attach(model, adapter)), y)
    torch.testing.assert_close(tiny.logits(lk.attach(dense, adapter)), y, atol=2e-5, rtol=1e-5)
    assert len(describe_adapter(adapter, str(tmp_path)).modules) == len(adapter.updates)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_have_it_each_for_itself(kind, model):
    tiny.randomise_factors(lk.attach(model, config(kind), name="a"))
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=3, targets=LINEARS), name="b"), seed=9)
    ids, wanted = tiny.example(model)["input_ids"][:2], []
    ids[:, 2] = 7
    with torch.no_grad():
        for row, choice in zip(ids, "ab", strict=True):
            lk.activate(model, choice)
            wanted.append(model(row[None]).logits)
        with lk.route(model, ["a", "b"]):
            found = model(ids).logits
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_pefts_trained_tokens_on_the_same_base_compute_the_same(model, tmp_path):
    tiny.randomise_factors(lk.attach(model, config("lora beside tokens")))
    ours = tiny.logits(model)
    lk.capture(model).save(tmp_path)
    lk.detach(model)
    for module in quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # else evaluation is in bf16 on CPUs that have it
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(ours, tiny.logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr", "vera"])
def test_merging_into_four_bits_is_refused_and_changes_nothing(kind, model):
    tiny.randomise_factors(lk.attach(model, config(kind)))
    before = tiny.bits(model)
    with pytest.raises(StateError, match="quantized"):
        lk.merge(model)
    assert tiny.same_bits(tiny.bits(model), before)


def test_trained_tokens_alone_merge_into_the_embedding_and_come_back_twenty_times(model):
    before = tiny.bits(model)
    tiny.randomise_factors(lk.attach(model, config("tokens")))
    y = tiny.logits(model)
    for _ in range(20):
        lk.merge(model)
        torch.testing.assert_close(tiny.logits(model), y, atol=1e-5, rtol=1e-5)
        lk.unmerge(model)
    lk.detach(model)
    assert tiny.same_bits(tiny.bits(model), before)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_copy_their_rows_alone(tied):
    model = tiny.llama(tied=tied)
    weight = model.get_input_embeddings().weight
    own = weight.data_ptr()
    lk.attach(model, config("tokens"))
    held = [t for m in model.modules() if hasattr(m, "lora_default") for t in m.lora_default.state_dict().values()]
    child = model.get_input_embeddings().lora_default
    assert [list(t.shape) for t in held] == [[3, weight.shape[1]]]
    assert child.original.shape == child.weight.shape == (3, weight.shape[1])
    assert model.get_input_embeddings().weight is weight
    assert weight.data_ptr() == own
    assert (model.get_output_embeddings().weight is weight) == tied
