"""Bottleneck adapters against their equation, at the four places where the papers put them, and their folder."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import lorakit as lk
from lorakit.adapter.bottleneck import Bottleneck
from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.formats import losses
from lorakit.methods import method_of
from lorakit.train.config import TrainConfig

RUN = {"data": "rows.jsonl", "model": "a base", "method": "bottleneck"}


def attached(model: nn.Module, **settings) -> nn.Module:
    size = {} if "reduction" in settings else {"bottleneck_size": 3}
    config = TrainConfig(**RUN | size | settings)
    method_of("bottleneck").attach(model, config, "default", "CAUSAL_LM")
    return tiny.randomise_factors(model)


def adapted(model: nn.Module) -> list[str]:
    return list(lk.capture(model).updates)


def by_hand(u: Bottleneck, y0: torch.Tensor) -> torch.Tensor:
    h = y0
    if u.norm is not None:
        h = (y0 - y0.mean(-1, keepdim=True)) / (y0.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        h = h * u.norm + u.norm_bias
    f = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[u.activation]
    return y0 + u.factor * (f(h @ u.down.T + u.down_bias) @ u.up.T + u.up_bias)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("norm", [False, True])
def test_it_computes_its_equation(activation, norm):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 6)).double(), torch.randn(2, 5, 7, dtype=torch.float64)
    base = model(x)
    lk.attach(
        model,
        lk.LoraConfig(
            variant="bottleneck",
            targets=["0"],
            rank=3,
            activation=activation,
            bottleneck_norm=norm,
            bottleneck_scale=0.5,
        ),
    )
    assert torch.equal(model(x), base)
    tiny.randomise_factors(model)
    value = lk.capture(model).updates["0"]
    torch.testing.assert_close(model(x), by_hand(value, base), rtol=1e-10, atol=1e-10)
    assert value.parameters == 3 * 6 * 2 + 3 + 6 + (12 if norm else 0)


def test_each_placement_is_the_papers(tiny_llama):
    attention = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    feedforward = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert sorted(adapted(attached(tiny_llama))) == sorted(attention + feedforward)
    assert adapted(attached(tiny.llama(), bottleneck="pfeiffer")) == feedforward
    own = attached(tiny.llama(), bottleneck="adapter_l")
    assert adapted(own) == feedforward
    assert all(u.norm is not None for u in lk.capture(own).updates.values())
    assert adapted(attached(tiny.llama(), bottleneck="pfeiffer", drop_layers=1)) == feedforward[1:]
    assert adapted(attached(tiny.llama(), bottleneck="pfeiffer", layers=[0])) == feedforward[:1]
    # Houlsby et al. 2019: 2 x (2 r d + r + d) parameters a layer
    u = lk.capture(tiny_llama).updates.values()
    assert sum(each.parameters for each in u) == 2 * 2 * (2 * 3 * 16 + 3 + 16)
    bert = adapted(attached(tiny.bert()))
    assert bert[:2] == ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"]
    assert adapted(attached(tiny.gpt2()))[:2] == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]


def test_the_size_may_be_a_share_of_the_outputs(tiny_llama):
    model = attached(tiny_llama, reduction=4)
    assert {u.rank for u in lk.capture(model).updates.values()} == {4}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bottleneck": "parallel"}, "read the input of a feed-forward as a block"),
        ({"bottleneck": "houlsbi"}, "did you mean 'houlsby'"),
        ({"rank": 4}, "rank has no effect with method: bottleneck"),
        ({"drop_layers": 2}, "no layer is left to adapt; the model has 2"),
        ({"activation": "swish"}, "activation"),
        ({"reduction": 0.5}, "reduction"),
    ],
)
def test_what_it_does_not_have_is_said(settings, said, tiny_llama):
    with pytest.raises(ConfigError, match=said):
        attached(tiny_llama, **settings)


def test_settings_and_layers_that_are_not_its_own_are_refused(tiny_llama):
    for given in ({"alpha": 8}, {"rslora": True}, {"alpha_pattern": {"o_proj": 8}}, {"lora_plus": 4}):
        with pytest.raises(ConfigError, match=f"LoraConfig.{next(iter(given))} has no effect: .* has no alpha"):
            lk.attach(tiny_llama, lk.LoraConfig(variant="bottleneck", **given))
    with pytest.raises(ConfigError, match=r"rank has no effect: reduction \(8\)"):
        lk.attach(tiny_llama, lk.LoraConfig(variant="bottleneck", rank=5, reduction=8))
    with pytest.raises(TargetError, match=r"'model.embed_tokens' is a Embedding; a bottleneck adapter stands behind"):
        lk.attach(tiny_llama, lk.LoraConfig(variant="bottleneck", targets=["embed_tokens"]))
    with pytest.raises(ConfigError, match="reduction has an effect with variant='bottleneck' only"):
        lk.LoraConfig(reduction=4)


def test_its_folder_is_read_to_the_bit_and_refused_by_peft(tmp_path, tiny_gpt2):
    import peft

    model = attached(tiny_gpt2, bottleneck="adapter_l", activation="gelu", save_modules=["ln_f"], reduction=8)
    folder = lk.capture(model).save(tmp_path)
    adapter = lk.Adapter.load(folder)
    assert (adapter.config.activation, adapter.config.reduction, adapter.config.bottleneck_norm) == ("gelu", 8, True)
    again = lk.attach(tiny.gpt2(), adapter)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert lk.capture(again).digest() == adapter.digest()
    with pytest.raises(KeyError, match="BOTTLENECK"):
        peft.PeftModel.from_pretrained(tiny.gpt2(), folder)


def test_a_damaged_folder_is_refused_with_the_key(tmp_path, tiny_llama):
    from safetensors.torch import load_file, save_file

    folder = lk.capture(attached(tiny_llama, bottleneck="pfeiffer")).save(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if key.endswith("bottleneck_up_bias"))
    save_file({k: t for k, t in tensors.items() if k != name}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="has no bottleneck_up_bias"):
        lk.Adapter.load(folder)
    save_file(tensors | {name: torch.zeros(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="expected"):
        lk.Adapter.load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"activation": "swish"}))
    with pytest.raises(AdapterError, match="activation"):
        lk.Adapter.load(folder)


def test_other_formats_and_files_refuse_it_with_the_reason(tiny_llama, tmp_path):
    adapter = lk.capture(attached(tiny_llama))
    for name in ("loralib", "gguf", "mlx", "adalora"):
        assert any("of kind bottleneck" in line and "lorakit's own folder" in line for line in losses(adapter, name))
        with pytest.raises(AdapterError, match="cannot hold"):
            adapter.save(tmp_path / "file.safetensors", format=name)
    ia3 = lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(variant="ia3", targets="ia3")))
    assert any("of kind ia3" in line and "merge the adapter" in line for line in losses(ia3, "loralib"))


def test_checkpointing_recomputes_it_with_the_same_gradients(tiny_llama):
    gradients = []
    for checkpointing in (False, True):
        model = attached(tiny.llama(), bottleneck="houlsby").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lk.attach(model, lk.capture(model), "again", trainable=True)
        ids = torch.arange(4, 16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-5, atol=1e-7)
