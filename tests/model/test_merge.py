"""merge and unmerge on a live model: right sums, every bit back, and no misuse."""

from __future__ import annotations

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import StateError
from lorakit.layers.layer import LoraLayer

MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "t5": tiny.t5,
    "cnn": tiny.cnn,
    "embedder": tiny.embedder,
}
TARGETS = {"cnn": r"conv.*|head", "embedder": ["emb", "head"]}


@pytest.fixture(params=MODELS)
def trained(request):
    model = MODELS[request.param]()
    return tiny.randomise_factors(
        lk.attach(model, lk.LoraConfig(rank=3, targets=TARGETS.get(request.param, "all-linear")))
    )


def test_a_merged_model_computes_what_the_adapter_did(trained):
    before, base = tiny.logits(trained), tiny.bits(trained)
    lk.merge(trained)
    torch.testing.assert_close(tiny.logits(trained), before, atol=1e-4, rtol=1e-4)
    assert not tiny.same_bits(tiny.bits(trained), base)
    lk.unmerge(trained)
    assert tiny.same_bits(tiny.bits(trained), base)
    assert torch.equal(tiny.logits(trained), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_twenty_cycles_over_eight_adapters_wear_nothing(dtype):
    model = tiny.llama(dtype=dtype)
    base = tiny.bits(model)
    for i in range(8):
        lk.attach(model, lk.LoraConfig(rank=2 + i % 3), name=f"a{i}")
    tiny.randomise_factors(model, size=0.1)
    for cycle in range(20):
        lk.activate(model, {f"a{cycle % 8}": 1.0, f"a{(cycle + 3) % 8}": -0.5})
        lk.merge(model)
        assert not tiny.same_bits(tiny.bits(model), base)
        lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), base)


def test_the_merged_weight_is_the_sum_rounded_once():
    model = tiny.mlp(torch.bfloat16)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=3, targets=["lin0"])))
    f, weight = lk.capture(model).factors["lin0"], model.lin0.weight.detach().float()
    lk.merge(model)
    assert torch.equal(model.lin0.weight, (weight + f.scale * (f.B @ f.A)).to(torch.bfloat16))


def test_what_unmerge_needs_is_at_most_a_byte_a_weight():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(torch.bfloat16)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=8, alpha=8, targets=["0"])), size=0.04)
    lk.merge(model)
    kept = sum(m.lora_merged.nbytes() for m in model.modules() if isinstance(m, LoraLayer))
    assert kept <= 0.6 * 256 * 256


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    with pytest.raises(StateError, match="nothing is merged"):
        lk.unmerge(tiny_mlp)
    lk.merge(tiny_mlp)
    with pytest.raises(StateError, match="'default' is merged already"):
        lk.merge(tiny_mlp)
    lk.unmerge(tiny_mlp)
    lk.activate(tiny_mlp, None)
    with pytest.raises(StateError, match="no adapter is active"):
        lk.merge(tiny_mlp)


def test_while_merged_nothing_else_can_be_activated_or_attached(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    lk.merge(tiny_mlp)
    with pytest.raises(StateError, match="'default' is merged into the base"):
        lk.activate(tiny_mlp, None)
    with pytest.raises(StateError, match="cannot attach 'b' while 'default' is merged"):
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name="b")


def test_detaching_while_merged_must_say_what_becomes_of_it(tiny_mlp):
    base = tiny.bits(tiny_mlp)
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2, bias="lora_only", save_modules=["norm"])))
    before = tiny.logits(tiny_mlp)
    lk.merge(tiny_mlp)
    with pytest.raises(StateError, match=r"merged='keep'.*merged='undo'"):
        lk.detach(tiny_mlp)
    lk.detach(tiny_mlp, merged="keep")
    assert not hasattr(tiny_mlp.lin0, "lora_merged")
    torch.testing.assert_close(tiny.logits(tiny_mlp), before)
    assert list(tiny_mlp.state_dict()) == list(base)

    other = tiny.mlp()
    tiny.randomise_factors(lk.attach(other, lk.LoraConfig(rank=2, bias="all")))
    lk.merge(other)
    lk.detach(other, merged="undo")
    assert tiny.same_bits(tiny.bits(other), base)


def test_a_merge_that_fails_leaves_every_weight_as_it_was(tied_llama):
    """q_proj could be merged; lm_head shares its weight with the embedding, so it cannot."""
    tiny.randomise_factors(lk.attach(tied_llama, lk.LoraConfig(rank=2, targets=["q_proj", "lm_head"])))
    base, before = tiny.bits(tied_llama), tiny.logits(tied_llama)
    with pytest.raises(StateError, match=r"'lm_head' shares its weight with model.embed_tokens \(tied weights\)"):
        lk.merge(tied_llama)
    assert tiny.same_bits(tiny.bits(tied_llama), base)
    assert torch.equal(tiny.logits(tied_llama), before)


def test_a_merge_that_fails_half_way_is_undone(tiny_mlp):
    tiny_mlp.lin1.to(torch.complex64)
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"]))
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin1"]), name="b")
    lk.activate(tiny_mlp, {"default": 1.0, "b": 1.0})
    tiny.randomise_factors(tiny_mlp)
    base = tiny_mlp.lin0.weight.detach().clone()
    with pytest.raises(StateError, match=r"'lin1' has a weight of torch.complex64"):
        lk.merge(tiny_mlp)
    assert torch.equal(tiny_mlp.lin0.weight, base)
    assert tiny_mlp.lin0.lora_merged is None


def test_unmerge_notices_factors_that_changed_since(tiny_mlp):
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2)))
    lk.merge(tiny_mlp)
    merged = tiny.bits(tiny_mlp)
    tiny.randomise_factors(tiny_mlp, 5)
    with pytest.raises(StateError, match="unmerge of 'lin0' would not restore the base's bits"):
        lk.unmerge(tiny_mlp)
    assert tiny.same_bits(tiny.bits(tiny_mlp), merged)
    tiny.randomise_factors(tiny_mlp)
    lk.unmerge(tiny_mlp)
    assert tiny.same_bits(tiny.bits(tiny_mlp), tiny.bits(tiny.mlp()))


def test_a_merged_model_can_be_copied_and_the_copy_unmerged(tiny_mlp):
    import copy

    base = tiny.bits(tiny_mlp)
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2)))
    lk.merge(tiny_mlp)
    twin = copy.deepcopy(tiny_mlp)
    lk.unmerge(twin)
    assert tiny.same_bits(tiny.bits(twin), base)


def test_weights_in_channels_last_order_merge_and_come_back():
    model = tiny.cnn()
    model.conv2.to(memory_format=torch.channels_last)
    base = tiny.bits(model)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=2, targets=["conv2"])))
    before = tiny.logits(model)
    lk.merge(model)
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-5, rtol=1e-5)
    lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), base)


def test_a_weight_shared_under_another_name_is_not_merged():
    model = tiny.embedder()
    model.register_parameter("projection", model.emb.weight)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=2, targets=["emb"])))
    with pytest.raises(StateError, match="'emb' shares its weight with projection"):
        lk.merge(model)


def test_a_module_that_another_adapter_saves_whole_can_be_merged(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"], save_modules=["head"]), name="whole")
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0", "head"]), name="low"))
    before, base = tiny.logits(tiny_mlp), tiny.bits(tiny_mlp)
    lk.merge(tiny_mlp)
    torch.testing.assert_close(tiny.logits(tiny_mlp), before)
    lk.unmerge(tiny_mlp)
    assert tiny.same_bits(tiny.bits(tiny_mlp), base)


def test_detach_takes_keep_or_undo(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    lk.merge(tiny_mlp)
    with pytest.raises(StateError, match="expected 'keep' or 'undo'"):
        lk.detach(tiny_mlp, merged="keepp")
