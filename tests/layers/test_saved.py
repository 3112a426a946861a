"""Weights that an adapter trains and holds whole: saved modules and biases."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.model.state import base_parameters

HEAD = lk.LoraConfig(rank=2, targets=["query", "value"], save_modules=["classifier"])


def trained(model: nn.Module, config: lk.LoraConfig, name: str = "default", seed: int = 1) -> nn.Module:
    return tiny.randomise_factors(lk.attach(model, config, name=name), seed)


def test_a_saved_module_trains_and_the_base_keeps_its_own(tiny_bert):
    original = tiny_bert.classifier.weight
    before = original.detach().clone()
    lk.attach(tiny_bert, HEAD)
    assert {n for n, p in tiny_bert.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "classifier.weight",
        "classifier.bias",
    }
    optimizer = torch.optim.SGD([p for p in tiny_bert.parameters() if p.requires_grad], lr=1.0)
    tiny_bert(**tiny.example(tiny_bert)).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(tiny_bert.classifier.weight, before)
    assert torch.equal(original, before)
    lk.activate(tiny_bert, None)
    assert tiny_bert.classifier.weight is original
    lk.detach(tiny_bert)
    assert tiny_bert.classifier.weight is original


def test_what_is_saved_is_captured_and_attaches_elsewhere(tiny_bert):
    trained(tiny_bert, HEAD)
    value, expected = lk.capture(tiny_bert), tiny.logits(tiny_bert)
    assert set(value.saved) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(tiny.logits(lk.attach(tiny.bert(), value)), expected)


def test_a_second_adapter_starts_from_the_base_not_from_the_first(tiny_bert):
    base = tiny.bits(tiny_bert)
    trained(tiny_bert, HEAD.replace(bias="lora_only"))
    lk.attach(tiny_bert, HEAD.replace(bias="lora_only"), name="second")
    for n in ("classifier.weight", "bert.encoder.layer.0.attention.self.query.bias"):
        assert torch.equal(lk.capture(tiny_bert, "second").saved[n], base[n])


def test_switching_switches_the_saved_weights_too(tiny_bert):
    base = tiny.logits(tiny_bert)
    trained(tiny_bert, HEAD, "a")
    with_a = tiny.logits(tiny_bert)
    lk.attach(tiny_bert, HEAD, name="b")
    b_only = tiny.logits(tiny_bert)
    assert torch.equal(b_only, base)
    lk.activate(tiny_bert, "a")
    assert torch.equal(tiny.logits(tiny_bert), with_a)
    lk.detach(tiny_bert, "a")
    lk.activate(tiny_bert, "b")
    assert torch.equal(tiny.logits(tiny_bert), base)


def test_whole_weights_cannot_be_mixed_or_scaled(tiny_bert):
    trained(tiny_bert, HEAD, "a")
    trained(tiny_bert, HEAD, "b")
    trained(tiny_bert, lk.LoraConfig(rank=2, targets=["key"]), "plain")
    for mix in ({"a": 1.0, "b": 1.0}, {"a": 0.5}, {"a": 0.5, "plain": 1.0}):
        with pytest.raises(StateError, match=r"adapter 'a' replaces weights of the base \(classifier"):
            lk.activate(tiny_bert, mix)
    lk.activate(tiny_bert, {"plain": 0.5, "a": 1.0})
    assert tiny_bert.classifier.weight is tiny_bert.classifier.lora_saved.get("a")["weight"]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_modes_train_just_those_biases(tiny_bert, bias):
    lk.attach(tiny_bert, lk.LoraConfig(rank=2, targets=["query"], bias=bias))
    got = {n for n, p in tiny_bert.named_parameters() if p.requires_grad and "lora_" not in n}
    biases = {n for n, _ in base_parameters(tiny_bert) if n.endswith(".bias")}
    assert got == {"none": set(), "all": biases, "lora_only": {n for n in biases if ".query." in n}}[bias]


def test_a_saved_tied_weight_stays_one_weight(tied_llama):
    lk.attach(tied_llama, lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["embed_tokens"]))
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    trainable = [p for p in tied_llama.parameters() if p.requires_grad and p.shape == tied_llama.lm_head.weight.shape]
    assert len(trainable) == 1, "an optimizer must not step it twice"
    tiny.randomise_factors(tied_llama)
    lk.activate(tied_llama, None)
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    lk.detach(tied_llama)
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    assert tiny.same_bits(tiny.bits(tied_llama), tiny.bits(tiny.llama(tied=True)))


def test_a_saved_container_is_trained_with_all_that_is_in_it(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["layers.1.mlp"]))
    saved = {n for n, p in tiny_llama.named_parameters() if p.requires_grad and "lora_" not in n}
    assert saved == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_all_linear_leaves_saved_modules_to_their_saving(tiny_bert):
    lk.attach(tiny_bert, lk.LoraConfig(rank=2, save_modules=["classifier"]))
    assert "classifier" not in lk.capture(tiny_bert).factors
    assert lk.summary(tiny_bert).skipped["classifier"] == "in save_modules"


def test_saved_modules_keep_the_precision_of_the_base():
    model = tiny.bert().to(torch.bfloat16)
    lk.attach(model, HEAD)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert tiny.logits(model).dtype == torch.bfloat16


def test_a_copy_with_saved_modules_is_independent(tiny_bert):
    trained(tiny_bert, HEAD)
    before = tiny.logits(tiny_bert)
    twin = copy.deepcopy(tiny_bert)
    tiny.randomise_factors(twin, 4)
    assert torch.equal(tiny.logits(tiny_bert), before)
    assert not torch.equal(tiny.logits(twin), before)
    assert twin.classifier.weight is twin.classifier.lora_saved.get("default")["weight"]


def test_saved_weights_that_do_not_fit_are_refused_and_nothing_changes(tiny_bert):
    value = lk.capture(trained(tiny.bert(), HEAD))
    before = tiny.picture(tiny_bert)
    wrong = lk.Adapter(value.config, value.factors, {**value.saved, "classifier.weight": torch.zeros(5, 16)})
    with pytest.raises(AdapterError, match=r"'classifier.weight' has shape \[5, 16\]; expected the model's, \[3, 16\]"):
        lk.attach(tiny_bert, wrong)
    lost = lk.Adapter(value.config, value.factors, {**value.saved, "clasifier.weight": torch.zeros(3, 16)})
    with pytest.raises(TargetError, match=r"clasifier.weight; did you mean 'classifier.weight'\?"):
        lk.attach(tiny_bert, lost)
    assert tiny.picture(tiny_bert) == before
    lk.attach(tiny_bert, lost, strict=False)
    assert "clasifier.weight" in lk.summary(tiny_bert).skipped


def test_save_modules_without_parameters_are_refused(tiny_bert):
    with pytest.raises(TargetError, match="has no parameters to train"):
        lk.attach(tiny_bert, lk.LoraConfig(targets=["query"], save_modules=["dropout"]))


def test_what_is_saved_whole_is_not_adapted_beside(tiny_bert):
    """As in PEFT: RoBERTa's head holds a `dense`, which a target "dense" would match."""
    lk.attach(tiny_bert, lk.LoraConfig(targets=["query", "dense"], save_modules=["layer.0.output"]))
    assert "bert.encoder.layer.0.output.dense" not in lk.capture(tiny_bert).factors
    assert "bert.encoder.layer.1.output.dense" in lk.capture(tiny_bert).factors
    assert lk.summary(tiny_bert).skipped["bert.encoder.layer.0.output.dense"] == "in save_modules"
    with pytest.raises(TargetError, match="nothing is left to adapt"):
        lk.attach(tiny_bert, lk.LoraConfig(targets=["classifier"], save_modules=["classifier"]), name="b")


@pytest.mark.parametrize(
    "task, saved", [("SEQ_CLS", {"classifier.weight", "classifier.bias"}), ("CAUSAL_LM", set()), (None, set())]
)
def test_a_classification_task_trains_the_fresh_head_whole(tiny_bert, task, saved):
    lk.attach(tiny_bert, lk.LoraConfig(rank=2, targets=["query"], task=task))
    assert set(lk.capture(tiny_bert).saved) == saved


def test_an_adapter_that_saved_one_end_of_a_tied_weight_replaces_that_end(tied_llama):
    """What PEFT does with modules_to_save=["embed_tokens"] on a tied model: the head stays the base's."""
    value = torch.randn(tiny.VOCAB, 16)
    other = tiny.llama(tied=True)
    other.model.embed_tokens.weight = nn.Parameter(value)
    config = lk.LoraConfig(save_modules=["embed_tokens"])
    lk.attach(tied_llama, lk.Adapter(config, {}, {"model.embed_tokens.weight": value}))
    assert torch.equal(tiny.logits(tied_llama), tiny.logits(other))
    lk.detach(tied_llama)
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()


def test_running_values_of_a_saved_module_are_refused_not_lost():
    """PEFT saves a batch norm's running mean; lorakit holds parameters only, and says so."""
    model = normed()
    before = tiny.picture(model)
    with pytest.raises(TargetError, match=r"'1' has buffers \(running_mean, running_var, num_batches_tracked\)"):
        lk.attach(model, lk.LoraConfig(targets=["0"], save_modules=["1"]))
    value = lk.Adapter(lk.LoraConfig(), {}, {"1.weight": torch.ones(6), "1.running_mean": torch.ones(6)})
    with pytest.raises(TargetError, match="values for buffers of the base"):
        lk.attach(model, value)
    assert tiny.picture(model) == before
    lk.attach(model, value, strict=False)
    assert "1.running_mean" in lk.summary(model).skipped


def test_a_module_that_is_offloaded_cannot_be_saved_whole():
    import accelerate

    model = tiny.llama()
    accelerate.cpu_offload(model, torch.device("cpu"))
    before = tiny.picture(model)
    with pytest.raises(StateError, match=r"'lm_head\.weight' is offloaded"):
        lk.attach(model, lk.LoraConfig(targets=["q_proj"], save_modules=["lm_head"]))
    assert tiny.picture(model) == before


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_the_state_dict_hooks_of_a_copy_are_the_copys(way, tiny_bert):
    base = tiny.bits(tiny.bert())
    trained(tiny_bert, HEAD)
    file = io.BytesIO()
    torch.save(tiny_bert, file)
    file.seek(0)
    twin = copy.deepcopy(tiny_bert) if way == "deepcopy" else torch.load(file, weights_only=False)
    expected = tiny.logits(twin)
    lk.detach(tiny_bert)
    assert tiny.same_bits(tiny.bits(twin), base)
    again = trained(tiny.bert(), HEAD, seed=8)
    again.load_state_dict(twin.state_dict())
    assert torch.equal(tiny.logits(again), expected)
    lk.detach(twin)
    assert list(twin.state_dict()) == list(base)
    twin.load_state_dict(base)
    for model in (twin, tiny_bert):
        assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())


def test_detaching_one_of_two_that_save_a_tied_weight_keeps_the_state_dict_whole(tied_llama):
    config = lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["embed_tokens"])
    trained(tied_llama, config, "a", 1)
    trained(tied_llama, config, "b", 2)
    lk.detach(tied_llama, "a")
    state = tied_llama.state_dict()
    assert not [name for name in state if "=a" in name]
    assert len({t.data_ptr() for n, t in state.items() if "lora_saved" in n}) == 1
    again = trained(tiny.llama(tied=True), config, "b", 9)
    again.load_state_dict(state)
    assert torch.equal(tiny.logits(again), tiny.logits(tied_llama))
