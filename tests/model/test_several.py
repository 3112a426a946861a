"""Several adapters on one model: names, weighted sums, switching, capturing and detaching one among them."""

from __future__ import annotations

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import StateError
from lorakit.layers.layer import child_name
from lorakit.model.activate import active, adapters

MAKERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5, "mlp": tiny.mlp, "cnn": tiny.cnn}


def value_of(make, config: lk.LoraConfig, seed: int) -> lk.Adapter:
    """A trained adapter for a model of this kind."""
    return lk.capture(tiny.randomise_factors(lk.attach(make(), config), seed))


@pytest.fixture(params=MAKERS)
def any_model(request):
    return MAKERS[request.param]()


def test_a_weighted_sum_computes_with_the_sum_of_the_updates():
    model = tiny.mlp(torch.float64)
    values = {
        n: value_of(lambda: tiny.mlp(torch.float64), lk.LoraConfig(rank=r, targets=["lin0", "lin1"], rslora=r == 2), r)
        for n, r in (("a", 2), ("b", 3))
    }
    for name, value in values.items():
        lk.attach(model, value, name=name)
    lk.activate(model, {"a": 0.7, "b": -0.4})
    merged = tiny.mlp(torch.float64)
    for m in ("lin0", "lin1"):
        merged.get_submodule(m).weight.data += sum(
            w * values[n].factors[m].scale * values[n].factors[m].B @ values[n].factors[m].A
            for n, w in (("a", 0.7), ("b", -0.4))
        )
    torch.testing.assert_close(tiny.logits(model), tiny.logits(merged), atol=1e-12, rtol=1e-12)
    lk.merge(model)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(merged), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "a.b",
        "items",
        "keys",
        "lora_x",
        "default",
        "pop",
        "weight",
        "forward",
        "full",
        "full_",
        "saved",
        "active",
        "lora_",
        "ü",
        "0",
    ],
)
def test_any_sensible_name_works(name):
    model = tiny.bert()
    base = tiny.logits(model)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["query"], save_modules=["classifier"]), name="other")
    lk.attach(
        model,
        lk.LoraConfig(rank=2, targets=["query", "dense"], bias="lora_only", save_modules=["classifier"]),
        name=name,
    )
    tiny.randomise_factors(model)
    assert active(model) == {name: 1.0}
    changed = tiny.logits(model)
    value = lk.capture(model, name)
    lk.activate(model, "other")
    lk.activate(model, name)
    assert torch.equal(tiny.logits(model), changed)
    lk.detach(model, name)
    lk.detach(model, "other")
    assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(lk.attach(model, value)), changed)


def test_names_that_would_be_one_child_cannot_both_be_used(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name="a.b")
    before = tiny.picture(tiny_mlp)
    with pytest.raises(StateError, match="a∙b"):
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name="a∙b")
    assert tiny.picture(tiny_mlp) == before


def test_an_empty_name_and_one_that_a_module_uses_itself_are_refused(tiny_mlp):
    tiny_mlp.lin1.lora_mine = 1
    before = tiny.picture(tiny_mlp)
    for name, said in (("", "name cannot be empty"), ("mine", "already has an attribute 'lora_mine'")):
        with pytest.raises(StateError, match=said):
            lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name=name)
        assert tiny.picture(tiny_mlp) == before


def test_no_name_of_an_adapted_class_can_be_an_adapters_child():
    from lorakit.layers import conv, embedding, linear, packed

    classes = [
        conv.ConvLayer,
        embedding.EmbeddingLayer,
        linear.LinearLayer,
        linear.Conv1DLayer,
        packed.PackedLayer,
        packed.PackedConv1DLayer,
    ]
    own = {
        n.removeprefix("lora_")
        for cls in classes
        for k in cls.__mro__
        for n in {*vars(k), *vars(k).get("__annotations__", {})}
        if n.startswith("lora_")
    }
    assert "full" in own
    assert not {child_name(n) for n in own | {"saved"}} & {f"lora_{n}" for n in own | {"saved"}}
    assert len({child_name(n) for n in ("full", "full_", "full__", "fuller")}) == 4


def test_an_unknown_name_is_an_error_with_the_nearest(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name="style")
    for call in (lk.activate, lk.capture, lk.detach):
        with pytest.raises(StateError, match=r"no adapter named 'stile' is attached; did you mean 'style'\?"):
            call(tiny_mlp, "stile")
    with pytest.raises(StateError, match="did you mean 'style'"):
        lk.activate(tiny_mlp, {"style": 1, "stlye": 0.5})
    assert active(tiny_mlp) == {"style": 1.0}


def test_a_name_can_be_used_once(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    with pytest.raises(StateError, match="'default' is attached already"):
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2))


def test_calls_on_a_model_without_adapters_say_so(tiny_mlp):
    for call in (lk.capture, lk.merge, lk.unmerge, lk.detach, lk.summary, lambda m: lk.activate(m, None)):
        with pytest.raises(StateError, match="no adapter is attached to this Mlp"):
            call(tiny_mlp)
    assert adapters(tiny_mlp) == []


def test_a_weight_must_be_finite(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    for weight in (float("nan"), float("inf")):
        with pytest.raises(StateError, match="expected a finite number"):
            lk.activate(tiny_mlp, {"default": weight})


def test_capture_of_one_among_several_needs_its_name(tiny_mlp):
    for name in "ab":
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name=name)
    with pytest.raises(StateError, match=r"2 adapters are attached: a, b\n  give the name of one"):
        lk.capture(tiny_mlp)


def test_detaching_one_leaves_the_others_as_they_were(tiny_mlp):
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2), name="a"))
    alone = tiny.logits(tiny_mlp)
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=3, targets=["lin0"]), name="b"))
    lk.activate(tiny_mlp, {"a": 1.0, "b": 2.0})
    lk.detach(tiny_mlp, "b")
    assert active(tiny_mlp) == {"a": 1.0}
    tiny.randomise_factors(tiny_mlp)
    assert torch.equal(tiny.logits(tiny_mlp), alone)


def test_what_is_captured_and_attached_again_computes_the_same(any_model):
    tiny.randomise_factors(lk.attach(any_model, lk.LoraConfig(rank=4, bias="all", rank_pattern={r".*[0h].*": 2})))
    before, value = tiny.logits(any_model), lk.capture(any_model)
    lk.detach(any_model)
    assert torch.equal(tiny.logits(lk.attach(any_model, value)), before)


def test_a_captured_adapter_is_a_copy(tiny_mlp):
    tiny.randomise_factors(lk.attach(tiny_mlp, lk.LoraConfig(rank=2)))
    value = lk.capture(tiny_mlp)
    before = {m: f.A.clone() for m, f in value.factors.items()}
    tiny.randomise_factors(tiny_mlp, 5)
    assert all(torch.equal(value.factors[m].A, A) for m, A in before.items())


def test_the_summary_counts_and_names_what_is_attached(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=4))
    s = lk.summary(tiny_llama)
    assert (
        s.trainable
        == sum(p.numel() for p in tiny_llama.parameters() if p.requires_grad)
        == sum(row.parameters for row in s.rows)
    )
    assert s.total == sum(p.numel() for p in tiny_llama.parameters())
    assert s.skipped == {"lm_head": "the output head"}
    text = str(s)
    assert "2 x 24x16" in text
    assert "skipped: lm_head" in text
    assert "'default'" in text


def test_the_summary_lists_what_is_trained_whole(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"], bias="lora_only"))
    s = lk.summary(tiny_mlp)
    assert s.trainable == sum(row.parameters for row in s.rows)
    assert [(row.name, row.rank) for row in s.rows] == [("lin0", 2), ("lin0.bias", None)]
    assert "saved" in str(s)


def test_activate_takes_a_name_or_weights(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(rank=2))
    with pytest.raises(StateError, match="got a list"):
        lk.activate(tiny_mlp, ["default"])
    with pytest.raises(StateError, match="is 'much'; expected a finite number"):
        lk.activate(tiny_mlp, {"default": "much"})
