"""Weights of an adapter by component and block, compared with diffusers' `set_adapters`."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_pipelines import close, draw, tiny_sd1, trained

import lorakit as lk
from lorakit.errors import StateError

THEIRS = {"unet": {"down": 0.3, "mid": 0.5, "up": {"block_1": [0.7, 0.2]}}, "text_encoder": 0.4}
OURS = {
    "unet.down_blocks": 0.3,
    "unet.mid_block": 0.5,
    "unet.up_blocks.1": 0.7,
    "unet.up_blocks.1.attentions.1": 0.2,
    "text_encoder": 0.4,
}


@pytest.fixture
def pipe():
    made = tiny_sd1()
    for name, seed in (("a", 1), ("b", 2)):
        trained(made, name, seed, components=["unet", "text_encoder"])
    return made


def theirs(pipe, tmp_path):
    made = tiny_sd1()
    for name in ("a", "b"):
        file = lk.capture(pipe, name).save(tmp_path / f"{name}.safetensors", format="diffusers")
        made.load_lora_weights(str(file), adapter_name=name)
    return made


def test_blocks_and_components_as_in_set_adapters(pipe, tmp_path):
    other = theirs(pipe, tmp_path)
    other.set_adapters(["a", "b"], [THEIRS, 0.6])
    lk.activate(pipe, {"a": OURS, "b": 0.6})
    close(draw(pipe), draw(other))
    assert lk.active(pipe) == {"a": OURS, "b": 0.6}
    other.set_adapters(["b"], [{"unet": 0.7}])  # what is not named has weight 1
    lk.activate(pipe, {"b": {"unet": 0.7}})
    close(draw(pipe), draw(other))


def test_the_longest_beginning_counts_and_ends_at_a_dot(pipe):
    lk.activate(pipe, {"a": {"unet": 0.0, "unet.up_blocks": 0.5, "unet.up_blocks.1.attentions.1": 2.0}})
    weights = {n: dict(m.lora_active).get("lora_a") for n, m in pipe.unet.named_modules() if hasattr(m, "lora_active")}
    assert {w for n, w in weights.items() if n.startswith("up_blocks.1.attentions.1")} == {2.0}
    assert {w for n, w in weights.items() if n.startswith("up_blocks.1.attentions.0")} == {0.5}
    assert {w for n, w in weights.items() if not n.startswith("up_blocks")} == {0.0}
    text = pipe.text_encoder.encoder.layers[0].self_attn.q_proj
    assert dict(text.lora_active) == {"lora_a": 1.0}


def test_they_are_merged_as_they_are_and_undone_to_the_bit(pipe):
    before = tiny.bits(pipe.unet)
    lk.activate(pipe, {"a": OURS, "b": {"unet": 0.0}})
    ours = draw(pipe)
    lk.merge(pipe)
    close(draw(pipe), ours, 1e-4)
    with pytest.raises(StateError, match=r"'a' \(0.3 x unet.down_blocks, .*\) \+ 'b' \(0 x unet\) is merged"):
        lk.activate(pipe, "a")
    lk.unmerge(pipe)
    assert tiny.same_bits(before, tiny.bits(pipe.unet))
    assert torch.equal(draw(pipe), ours)
    lk.detach(pipe, "b")
    assert lk.active(pipe) == {"a": OURS}
    assert "0.3 x unet.down_blocks" in str(lk.summary(pipe))


def test_they_work_on_any_model():
    model = tiny.llama()
    lk.attach(model, lk.LoraConfig(rank=2))
    tiny.randomise_factors(model)
    lk.activate(model, {"default": {"model.layers.1": 0.0}})
    halved = tiny.logits(model)
    for name, layer in model.named_modules():
        if name.startswith("model.layers.1.") and hasattr(layer, "lora_default"):
            layer.lora_default.B.data.zero_()
    lk.activate(model, "default")
    torch.testing.assert_close(tiny.logits(model), halved)


def test_what_is_wrong_is_said_and_nothing_changes(pipe):
    for which, message in (
        ({"a": {"unett": 0.5}}, r"'a' for 'unett': it changes no module there; did you mean 'unet'"),
        ({"a": {"unet.up_block": 0.5}}, r"did you mean 'unet\.up_blocks'"),
        ({"a": {"unet": float("nan")}}, r"'a' for 'unet' is nan; expected a finite number"),
        ({"a": {"": 0.5}}, r"'a' for '': it changes no module there\n.*such as "),
        ({"a": {"unet": "0.5"}}, r"is '0.5'; expected a finite number"),
    ):
        with pytest.raises(StateError, match=message):
            lk.activate(pipe, which)
    assert lk.active(pipe) == {"b": 1.0}
    with (
        pytest.raises(StateError, match="weights by component or block are for"),
        lk.route(pipe, [{"a": {"unet": 0.5}}]),
    ):
        pass


def test_saved_weights_cannot_be_scaled_by_a_block_either(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["norm"]))
    with pytest.raises(StateError, match=r"'default' replaces weights .*model\.norm\.weight.* cannot be scaled"):
        lk.activate(tiny_llama, {"default": {"model.norm": 0.5}})
    lk.activate(tiny_llama, {"default": {"model.layers": 0.5}})
