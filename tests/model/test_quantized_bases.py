"""A language model whose linears bitsandbytes has quantized to 4 bits: everything an adapter does on it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import quantized
import tiny
import torch

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, ConfigError, StateError, TargetError
from lorakit.layers.bases import quantized as quantized_modules

CONFIG = lk.LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model in float32."""
    path = tmp_path_factory.mktemp("base")
    quantized.llama().save_pretrained(path)
    return path


@pytest.fixture(params=["nf4", "nf4, double"])
def model(request, folder):
    return quantized.in_4_bits(folder, double=request.param != "nf4")


def test_outputs_and_gradients_are_those_of_the_dequantized_weights(folder, model):
    dense = quantized.unpacked(folder, model)
    for each in (model, dense):
        tiny.randomise_factors(lk.attach(each, CONFIG)).eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense), atol=1e-5, rtol=1e-5)  # without gradients first
    ours, theirs = quantized.gradients(model), quantized.gradients(dense)
    assert set(ours) == set(theirs) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


def test_peft_on_the_same_quantized_model_computes_the_same(folder, model, tmp_path):
    tiny.randomise_factors(lk.attach(model, CONFIG))
    ours = tiny.logits(model)
    lk.capture(model).save(tmp_path)
    lk.detach(model)
    for module in quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # else evaluation is in bf16 on CPUs that have it
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    assert "bnb" in type(theirs.base_model.model.model.layers[0].self_attn.q_proj).__module__
    torch.testing.assert_close(ours, tiny.logits(theirs), atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_detach_leaves_every_byte(model):
    before, picture = tiny.bits(model), tiny.picture(model)
    lk.attach(model, lk.LoraConfig(rank=4, targets="all-linear"))
    assert len(lk.capture(model).updates) == 14
    inputs = tiny.example(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    trained = tiny.logits(model.eval())
    copied = copy.deepcopy(model)
    assert torch.equal(tiny.logits(copied), trained)
    adapter = lk.capture(model)
    lk.detach(model)
    assert tiny.picture(model) == picture
    assert tiny.same_bits(tiny.bits(model), before)
    lk.attach(model, adapter)
    assert torch.equal(tiny.logits(model), trained)


def test_an_adapter_goes_from_4_bits_to_16_and_back_without_force(folder, model, tmp_path):
    tiny.randomise_factors(lk.attach(model, CONFIG))
    lk.capture(model).save(tmp_path / "from4")
    written = json.loads((tmp_path / "from4" / "lorakit.json").read_text())["fingerprint"]
    assert set(written["rounding"]) < set(written["samples"])  # of the quantized weights alone
    dense = tiny.randomise_factors(lk.attach(quantized.llama(), CONFIG))
    lk.capture(dense).save(tmp_path / "from32")
    plain = json.loads((tmp_path / "from32" / "lorakit.json").read_text())["fingerprint"]
    assert "rounding" not in plain
    assert {k: plain[k] for k in ("shapes", "parameters")} == {k: written[k] for k in ("shapes", "parameters")}
    for dtype in (torch.float32, torch.bfloat16):
        lk.attach(quantized.llama(dtype=dtype), lk.Adapter.load(tmp_path / "from4"))
    for double in (False, True):
        for path in ("from4", "from32"):
            lk.attach(quantized.in_4_bits(folder, double=double), lk.Adapter.load(tmp_path / path))
    mixed = lk.Adapter.load(tmp_path / "from4") + lk.Adapter.load(tmp_path / "from32")  # of one base
    assert set(mixed.updates) == set(lk.Adapter.load(tmp_path / "from4").updates)


def test_another_base_is_refused_whichever_of_the_two_is_quantized(folder, model, tmp_path):
    from4 = lk.capture(lk.attach(model, CONFIG))
    from32 = lk.capture(lk.attach(quantized.llama(), CONFIG))
    name = next(iter(from4.metadata["fingerprint"]["rounding"]))
    other = quantized.llama()
    with torch.no_grad():  # nothing but a weight that 4 bits hold
        weight = other.get_parameter(name)
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.02)
    other.save_pretrained(tmp_path)
    message = rf"trained on another base:\n  weights: {name} holds other values\n"
    for adapter in (from4, from32):
        with pytest.raises(AdapterError, match=message):
            lk.attach(quantized.in_4_bits(tmp_path), adapter)
    with pytest.raises(AdapterError, match=message):
        lk.attach(other, from4)


def test_the_merged_checkpoint_of_the_unquantized_base_takes_it(folder, model, tmp_path):
    """The way that the refusal to merge in place names."""
    tiny.randomise_factors(lk.attach(model, CONFIG))
    with pytest.raises(StateError, match="lorakit merge BASE ADAPTER OUT"):
        lk.merge(model)
    lk.capture(model).save(tmp_path / "adapter")
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "out")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    dense = lk.attach(quantized.llama(), lk.Adapter.load(tmp_path / "adapter"))
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(dense), atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_with_adapters_of_their_own(model):
    for seed, name in enumerate(("a", "b")):
        lk.attach(model, CONFIG.replace(rank=2 + seed), name=name, trainable=seed == 0)
    tiny.randomise_factors(model)
    ids = tiny.example(model)["input_ids"]
    rows = torch.cat([ids, ids[:1]])
    choices = ["a", "b", None]

    def alone(name, row):
        lk.activate(model, name)
        return model(input_ids=row[None]).logits[0]

    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            with lk.route(model, choices):
                mixed = model(input_ids=rows).logits
            for got, name, row in zip(mixed, choices, rows, strict=True):
                torch.testing.assert_close(got, alone(name, row), atol=1e-5, rtol=1e-5)
    lk.activate(model, {"a": 0.5, "b": 0.5})
    assert not torch.equal(tiny.logits(model), mixed[:2])
    with lk.route(model, ["a", "b"]):
        answers = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    lk.activate(model, "b")
    assert torch.equal(answers[1:], model.generate(ids[1:], max_new_tokens=4, do_sample=False, eos_token_id=None))


def test_the_summary_counts_weights_not_bytes(model):
    said = lk.summary(lk.attach(model, CONFIG))
    dense = lk.summary(lk.attach(quantized.llama(), CONFIG))
    assert (said.trainable, said.total) == (dense.trainable, dense.total)
    assert [row.shape for row in said.rows] == [row.shape for row in dense.rows]


def test_a_quantized_weight_cannot_be_trained_whole(model):
    before = tiny.picture(model)
    with pytest.raises(TargetError, match=r"'model.layers.0.mlp' is quantized(.|\n)*LoraConfig.save_modules"):
        lk.attach(model, lk.LoraConfig(targets=["q_proj"], save_modules=["mlp"]))
    adapter = lk.capture(lk.attach(quantized.llama(), lk.LoraConfig(targets=["q_proj"], save_modules=["down_proj"])))
    with pytest.raises(AdapterError, match=r"for 'model.layers.0.mlp.down_proj', which this base holds quantized"):
        lk.attach(model, adapter, force=True)
    assert tiny.picture(model) == before
    lk.attach(model, lk.LoraConfig(targets=["q_proj"], save_modules=["lm_head"]))  # which is not quantized


def test_gpt2_whose_conv1d_become_linears(tmp_path):
    quantized.gpt2().save_pretrained(tmp_path)
    model = quantized.in_4_bits(tmp_path)
    config = lk.LoraConfig(rank=2, targets=["c_attn", "c_proj"])
    tiny.randomise_factors(lk.attach(model, config))
    lk.attach(quantized.gpt2(), lk.capture(model))
    dense = tiny.randomise_factors(lk.attach(quantized.gpt2(), config), seed=3)
    value = lk.capture(dense)
    lk.attach(quantized.in_4_bits(tmp_path), value)
    lk.attach(model, value, name="second")
    assert lk.capture(model, "second").updates.keys() == value.updates.keys()


def test_evaluation_cannot_repack_the_weights_while_adapters_are_attached(folder):
    """On a CPU with AVX512-BF16 bitsandbytes repacks in the first evaluation; the switch is set here as it is there."""
    model = quantized.in_4_bits(folder)
    switched = list(quantized_modules(model).values())
    for module in switched:
        module.support_avx512bf16_for_cpu = True
    before = tiny.picture(model)
    lk.attach(model, CONFIG)
    assert not any(m.support_avx512bf16_for_cpu for m in switched)  # also those without adapter: gradients pass them
    lk.attach(model, CONFIG, name="second")
    lk.detach(model, "second")
    assert not any(m.support_avx512bf16_for_cpu for m in switched)
    lk.detach(model)
    assert all(m.support_avx512bf16_for_cpu for m in switched)
    assert tiny.picture(model) == before


def test_a_start_that_calls_the_base_cannot_repack_the_weights(folder):
    """A prefix starts as keys and values that the base computes, in eval mode."""
    model = quantized.in_4_bits(folder)
    switched = list(quantized_modules(model).values())
    for module in switched:
        module.support_avx512bf16_for_cpu = True
    with pytest.raises(ConfigError, match="token id 1000000"):
        lk.attach(model, lk.LoraConfig(variant="prefix", virtual_tokens=2, prompt_text=[1_000_000]))
    assert all(m.support_avx512bf16_for_cpu for m in switched)
    lk.attach(model, lk.LoraConfig(variant="prefix", virtual_tokens=2))
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in switched)
    assert {name.rpartition(".")[2] for name in quantized.gradients(model)} == {"embeddings"}


def test_weights_that_were_repacked_are_refused(folder):
    model = quantized.in_4_bits(folder)
    module = model.model.layers[1].mlp.up_proj
    module.weight.quant_state.packing_format_for_cpu = True  # as the library marks it
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(StateError, match=r"'model.layers.1.mlp.up_proj' was repacked(.|\n)*load the base again"):
        lk.attach(model, CONFIG)
    assert {n: type(m) for n, m in model.named_modules()} == before


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512-BF16")
def test_an_evaluation_before_attaching_repacks_and_one_after_does_not(folder):
    model = quantized.in_4_bits(folder)
    lk.attach(model, CONFIG)
    tiny.logits(model)
    lk.attach(model, CONFIG, name="second")
    lk.detach(model)
    tiny.logits(model)
    with pytest.raises(StateError, match="was repacked"):
        lk.attach(model, CONFIG)


def test_nothing_imports_the_library_unasked():
    code = (
        "import sys, torch, lorakit as lk\n"
        "m = lk.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), lk.LoraConfig(rank=2, targets=['0']))\n"
        "lk.merge(m); lk.unmerge(m); lk.summary(m); lk.detach(m)\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
