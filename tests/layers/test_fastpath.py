"""torch's own transformer layers: an adapter there has its effect or is refused, in eval too."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError


def encoder(layers: int = 2, activation: str = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
PAD = torch.arange(6)[None] >= torch.tensor([6, 4, 2])[:, None]
FFN = lk.LoraConfig(rank=3, targets=["linear1", "linear2"])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_adapted_encoder_layer_computes_the_same_in_eval_and_training(activation):
    layer = encoder(1, activation).layers[0]
    tiny.randomise_factors(lk.attach(layer, FFN))
    with torch.inference_mode():
        fast = layer(X)
        with_mask = layer(X, src_key_padding_mask=PAD)
    layer.train()
    torch.testing.assert_close(fast, layer(X))
    torch.testing.assert_close(with_mask[~PAD], layer(X, src_key_padding_mask=PAD)[~PAD])


def test_an_adapted_encoder_computes_the_same_in_eval_with_padding():
    model = encoder()
    base = model(X, src_key_padding_mask=PAD)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=3, targets=["layers.1.linear1"])))
    with torch.inference_mode():
        fast = model(X, src_key_padding_mask=PAD)
    model.train()
    slow = model(X, src_key_padding_mask=PAD)
    torch.testing.assert_close(fast[~PAD], slow[~PAD])
    assert not torch.allclose(fast[~PAD], base[~PAD], atol=1e-3)


def test_all_linear_includes_multihead_attention_and_computes_with_it_in_eval():
    model = encoder()
    base = model(X, src_key_padding_mask=PAD)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=2)))
    assert {m.split(".", 2)[-1] for m in lk.capture(model).factors} == {
        "self_attn",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    }
    with torch.inference_mode():
        fast = model(X, src_key_padding_mask=PAD)
    kept = ~PAD  # the others are not computed on torch's own fast path
    torch.testing.assert_close(fast[kept], model.train()(X, src_key_padding_mask=PAD)[kept])
    assert not torch.allclose(fast[kept], base[kept], atol=1e-3)


def test_naming_the_output_projection_of_multihead_attention_is_refused():
    with pytest.raises(
        TargetError, match=r"(?s)out_proj' cannot be adapted alone: nn.MultiheadAttention reads.*name the attention"
    ):
        lk.attach(encoder(), lk.LoraConfig(rank=2, targets=["linear1", "out_proj"]))


def test_a_file_for_the_output_projection_is_refused_too():
    model = encoder()
    f = lk.Factors(torch.randn(2, 16), torch.randn(16, 2), 4.0)
    before = tiny.picture(model)
    with pytest.raises(TargetError, match="cannot be adapted"):
        lk.attach(model, lk.Adapter(lk.LoraConfig(rank=2, targets=["out_proj"]), {"layers.0.self_attn.out_proj": f}))
    assert tiny.picture(model) == before


def test_detach_opens_the_fast_path_again():
    model = encoder()
    before, base = tiny.picture(model), model(X, src_key_padding_mask=PAD)
    marks = (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu)
    lk.attach(model, FFN, name="a")
    lk.attach(model, FFN, name="b")
    lk.detach(model, "a")
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (False, 0)
    lk.detach(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == marks
    assert tiny.picture(model) == before
    assert torch.equal(model(X, src_key_padding_mask=PAD), base)


def test_a_decoder_layer_computes_with_the_adapter_in_eval():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval()
    tiny.randomise_factors(lk.attach(layer, FFN))
    with torch.inference_mode():
        fast = layer(X, X)
    torch.testing.assert_close(fast, layer.train()(X, X))


def test_a_merged_encoder_computes_the_same():
    model = encoder()
    tiny.randomise_factors(lk.attach(model, FFN))
    before = model(X)
    lk.detach(lk.merge(model) or model, merged="keep")
    torch.testing.assert_close(model(X), before, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(X, src_key_padding_mask=PAD)[~PAD], model.train()(X, src_key_padding_mask=PAD)[~PAD]
        )
