"""The base's fingerprint: another base is an error that says what differs; the same in another form is not."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.adapter.fingerprint import Quantized, differences, fingerprint
from lorakit.errors import AdapterError

CONFIG = lk.LoraConfig(rank=2, targets=["q_proj"])


@pytest.fixture
def value(tmp_path) -> lk.Adapter:
    lk.capture(tiny.randomise_factors(lk.attach(tiny.llama(), CONFIG))).save(tmp_path)
    return lk.Adapter.load(tmp_path)


def test_the_same_base_is_accepted_in_any_precision_and_tied_or_not(value):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lk.attach(tiny.llama(dtype=dtype), value)


def test_other_weights_of_the_same_shape_are_refused_and_named(value):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    before = tiny.picture(model)
    with pytest.raises(
        AdapterError, match=r"trained on another base:\n  weights: lm_head.weight holds other values\n.*force=True"
    ):
        lk.attach(model, value)
    assert tiny.picture(model) == before
    lk.attach(model, value, force=True)


def test_other_shapes_and_architectures_are_named():
    from transformers import LlamaModel

    value = lk.capture(lk.attach(tiny.llama(), CONFIG))
    model = tiny.llama()
    model.resize_token_embeddings(50)
    message = r"shapes of the parameters differ: the adapter's base has [\d,]+ parameters, this one [\d,]+"
    with pytest.raises(AdapterError, match=message):
        lk.attach(model, value)
    with pytest.raises(
        AdapterError, match="architecture: the adapter was trained on LlamaForCausalLM, this is LlamaModel"
    ):
        lk.attach(LlamaModel(tiny.llama().config), value)


def test_what_is_attached_or_active_does_not_change_the_fingerprint(value):
    model = tiny.llama()
    lk.attach(
        model, lk.LoraConfig(rank=2, targets=["embed_tokens"], bias="all", save_modules=["lm_head"]), name="other"
    )
    tiny.randomise_factors(model)
    lk.attach(model, value)
    again = lk.capture(model, "default")
    assert again.metadata["fingerprint"] == value.metadata["fingerprint"]
    fresh = lk.attach(model, CONFIG, name="third")
    assert lk.capture(fresh, "third").metadata["fingerprint"] == value.metadata["fingerprint"]


def test_an_adapter_without_a_fingerprint_attaches(value):
    lk.attach(tiny.llama(), lk.Adapter(value.config, value.factors, metadata={}))


def test_a_fingerprint_survives_a_copy_and_does_not_share_it(value):
    assert copy.deepcopy(dict(value.metadata)) == dict(value.metadata)
    model = lk.attach(tiny.llama(), value)
    got = lk.capture(model).metadata
    got["fingerprint"]["architecture"] = "changed"
    assert value.metadata["fingerprint"]["architecture"] == "LlamaForCausalLM"


def rounded(weight: torch.Tensor, step: float) -> Quantized:
    """The weight, quantized to multiples of `step`."""
    flat = weight.flatten()
    values = (flat / step).round() * step
    return Quantized(tuple(weight.shape), lambda at: (values[at], torch.full((len(at),), step / 2)))


def test_no_more_than_the_rounding_of_a_quantized_weight_is_allowed():
    exact = {"a": torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), "b": torch.ones(4, 4)}
    quantized = exact | {"a": rounded(exact["a"], 0.5)}
    for then, now in ((exact, quantized), (quantized, exact), (quantized, quantized)):
        assert differences(fingerprint(then, "Net"), now, "Net") == []
    for name in ("a", "b"):  # of b, which is not quantized, nothing but a percent
        other = exact | {name: exact[name] + (0.4 if name == "a" else 0.1)}
        line = [f"weights: {name} holds other values"]
        assert differences(fingerprint(quantized, "Net"), other, "Net") == line
        assert differences(fingerprint(other, "Net"), quantized, "Net") == line


def test_a_fingerprint_written_before_there_were_quantized_weights_is_read():
    exact = {"a": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    old = fingerprint(exact, "Net")
    assert set(old) == {"architecture", "parameters", "shapes", "samples"}
    assert differences(old, {"a": rounded(exact["a"], 0.5)}, "Net") == []


@pytest.mark.parametrize(
    "rounding", ["x", {"a": "x"}, {"a": [None] * 16}, {"a": [-1] * 16}, {"a": [float("inf")] * 16}]
)
def test_an_unsound_rounding_from_a_file_is_no_licence(rounding):
    exact = {"a": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    found = {**fingerprint(exact, "Net"), "rounding": rounding}
    assert differences(found, exact, "Net") == ["the adapter's fingerprint of its base is damaged"]
    short = {**found, "rounding": {"a": [9.0]}}
    assert differences(short, exact, "Net") == ["weights: a holds other values"]
