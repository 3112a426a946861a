"""save_pretrained and Trainer checkpoints of a model with adapters load in transformers, with the adapter."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import lorakit as lk
from lorakit.errors import StateError

CASES = {
    "llama": (tiny.llama, AutoModelForCausalLM, lk.LoraConfig(rank=2)),
    "llama, head and norm": (
        tiny.llama,
        AutoModelForCausalLM,
        lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["lm_head", "norm"]),
    ),
    "tied, embedding": (
        lambda: tiny.llama(tied=True),
        AutoModelForCausalLM,
        lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["embed_tokens"]),
    ),
    "bert, classifier": (
        tiny.bert,
        AutoModelForSequenceClassification,
        lk.LoraConfig(rank=2, targets=["query", "value"], save_modules=["classifier"], task="SEQ_CLS"),
    ),
    "bert, biases": (
        tiny.bert,
        AutoModelForSequenceClassification,
        lk.LoraConfig(rank=2, targets=["query"], bias="lora_only"),
    ),
    "gpt2": (tiny.gpt2, AutoModelForCausalLM, lk.LoraConfig(rank=2)),
    "t5": (tiny.t5, AutoModelForSeq2SeqLM, lk.LoraConfig(rank=2, targets=["q", "v"], save_modules=["lm_head"])),
}


def trained(model, config, name="default", seed=1):
    return tiny.randomise_factors(lk.attach(model, config, name), seed).eval()


@pytest.fixture(params=CASES)
def case(request):
    make, auto, config = CASES[request.param]
    return trained(make(), config), auto, make, config


def test_what_is_saved_loads_in_transformers_with_the_adapter(case, tmp_path):
    model, auto, *_ = case
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-5, rtol=1e-5)


def test_it_loads_back_into_the_model_with_its_adapter(case, tmp_path):
    model, _, make, config = case
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    again = trained(make(), config, seed=7)
    result = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    again.tie_weights()
    torch.testing.assert_close(tiny.logits(again), expected)
    assert tiny.same_bits(tiny.bits(again), tiny.bits(make()))


def test_the_adapter_alone_is_read_by_lorakit_and_names_its_base(case, tmp_path):
    model, _, make, _ = case
    model.name_or_path = "some/base"
    model.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    assert adapter.config.base == "some/base"
    assert torch.equal(tiny.logits(lk.attach(make(), adapter)), tiny.logits(model))


@pytest.mark.parametrize("name", ["llama", "llama, head and norm", "bert, classifier"])
def test_a_trainers_checkpoint_is_the_adapted_model_and_resumes(name, tmp_path):
    make, auto, config = CASES[name]
    rows = [
        {"input_ids": row, "labels": row if "llama" in name else row[0] % 3} for row in torch.randint(3, 40, (8, 6))
    ]

    def run(steps, resume=None):
        torch.manual_seed(5)
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(lk.attach(make(), config), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(4)
    trainer.save_model(str(tmp_path / "saved"))
    expected = tiny.logits(trainer.model.eval())
    assert not torch.allclose(expected, tiny.logits(make()))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        loaded = auto.from_pretrained(folder).eval()
        torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-5, rtol=1e-5)
    resumed = run(4, str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(tiny.logits(resumed.model.eval()), expected, atol=1e-5, rtol=1e-5)


def test_the_base_is_what_a_state_dict_calls_by_its_names(tiny_bert):
    config = CASES["bert, classifier"][2]
    base = tiny.bits(tiny_bert)
    trained(tiny_bert, config)
    assert tiny.same_bits(tiny.bits(tiny_bert), base)
    fresh = {name: torch.randn_like(value) for name, value in base.items()}
    copied = lk.capture(tiny_bert)
    tiny_bert.load_state_dict(fresh, strict=False)  # a checkpoint of the base goes into the base
    assert all(torch.equal(value, copied.saved[n]) for n, value in lk.capture(tiny_bert).saved.items())
    lk.detach(tiny_bert)
    assert tiny.same_bits(tiny.bits(tiny_bert), fresh)


def test_a_state_dict_of_the_adapted_model_loads_strictly(tiny_bert):
    config = CASES["bert, classifier"][2]
    source = trained(tiny.bert(), config, seed=3)
    lk.attach(tiny_bert, config)
    tiny_bert.load_state_dict(source.state_dict())
    assert torch.equal(tiny.logits(tiny_bert), tiny.logits(source))


def test_a_merged_model_is_saved_as_the_plain_model_that_it_is(case, tmp_path):
    model, auto, *_ = case
    expected = tiny.logits(model)
    lk.merge(model)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora_" in key]
    torch.testing.assert_close(tiny.logits(auto.from_pretrained(tmp_path).eval()), expected, atol=1e-5, rtol=1e-5)


def test_of_several_adapters_the_active_one_loads_and_all_are_there(tiny_llama, tmp_path):
    config = lk.LoraConfig(rank=2, targets=["q_proj"])
    trained(tiny_llama, config, "a/1", 1)
    trained(tiny_llama, config, "b", 2)
    tiny_llama.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(tiny_llama), atol=1e-5, rtol=1e-5)
    lk.activate(tiny_llama, "a/1")
    beside = lk.attach(tiny.llama(), lk.Adapter.load(tmp_path / "one" / "a∙1"))
    assert torch.equal(tiny.logits(beside), tiny.logits(tiny_llama))
    lk.activate(tiny_llama, {"a/1": 0.5, "b": 0.5})
    with pytest.warns(UserWarning, match=r"0.5 x 'a/1' \+ 0.5 x 'b' is active.*the base alone"):
        tiny_llama.save_pretrained(tmp_path / "two")
    assert lk.Adapter.load(tmp_path / "two" / "b").factors
    lk.activate(tiny_llama, None)
    tiny_llama.save_pretrained(tmp_path / "none")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "none")), tiny.logits(tiny.llama()))


def test_a_folder_with_an_adapter_is_not_given_a_model_that_has_it_merged(tiny_llama, tmp_path):
    trained(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj"]))
    tiny_llama.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    lk.merge(tiny_llama)
    with pytest.raises(StateError, match="would load on top of this model"):
        tiny_llama.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_where_peft_is_missing_a_warning_says_that_the_adapter_would_not_be_loaded(tiny_llama, tmp_path, monkeypatch):
    trained(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"only where peft is installed.*\n.*pip install peft"):
        tiny_llama.save_pretrained(tmp_path)


def test_copies_save_themselves_and_detach_leaves_nothing(tiny_llama, tmp_path):
    plain = set(tiny_llama.__dict__)
    trained(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj"]))
    twin = copy.deepcopy(tiny_llama)
    tiny.randomise_factors(twin, seed=9)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    for number, model in enumerate((twin, torch.load(file, weights_only=False))):
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(twin), atol=1e-5, rtol=1e-5)
    lk.detach(tiny_llama)
    assert set(tiny_llama.__dict__) == plain
    with pytest.raises(StateError, match=r"call model.push_to_hub"):
        twin.save_pretrained(tmp_path / "x", push_to_hub=True)
