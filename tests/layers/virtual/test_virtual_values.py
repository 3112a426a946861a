"""Virtual tokens that are attached from values: what they keep of a config, and what they leave alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
from lorakit.layers.virtual.body import Call
from lorakit.layers.virtual.encoder import encoder_from

LSTM = {"virtual_tokens": 3, "prompt_encoder": "lstm", "encoder_dropout": 0.3}
DRAWS = {"uniform_", "normal_", "bernoulli_", "random_"}


class Draws(TorchDispatchMode):
    """Notes the devices on which random numbers are drawn."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in DRAWS:
            self.devices.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "given", [{"variant": "p_tuning"}, {"prompt": "p_tuning", "targets": ["q_proj"], "dropout": 0.1}]
)
def test_an_lstm_keeps_its_own_dropout_when_training_goes_on(given):
    adapter = lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(**given, **LSTM)))
    model = lk.attach(tiny.llama(), adapter, trainable=True)
    assert model.model.lora_default.encoder.lstm_head.dropout == 0.3
    if "targets" in given:
        assert model.model.layers[0].self_attn.q_proj.lora_default.dropout == 0.1


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_an_encoder_is_loaded_without_a_random_number_of_its_device(network):
    config = lk.LoraConfig(variant="p_tuning", virtual_tokens=3, prompt_encoder=network)
    value = lk.capture(lk.attach(tiny.llama(), config)).updates["base_model"]
    before = torch.random.get_rng_state()
    for device in ("cpu", "meta"):
        with Draws() as draws:
            encoder = encoder_from(
                "p_tuning", value.encoder, 0.0, {"device": torch.device(device), "dtype": torch.float64}
            )
        assert draws.devices <= {"cpu"}
        assert {(p.device.type, p.dtype) for p in encoder.parameters()} == {(device, torch.float64)}
        if device == "cpu":
            assert all(torch.equal(p, value.encoder[name].double()) for name, p in encoder.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_prefix_is_put_where_each_layer_computes():
    model = lk.attach(tiny.llama(), lk.LoraConfig(variant="prefix", virtual_tokens=3))
    body = model.model
    body.layers[1].to("meta")  # as with accelerate's device_map, another device than the embedding's
    call = Call(body, (), {"input_ids": torch.tensor([[5, 9]])})
    body.lora_default.put_in(body, call)
    assert [layer.keys.device.type for layer in call.cache.layers] == ["cpu", "meta"]
    assert [layer.values.device.type for layer in call.cache.layers] == ["cpu", "meta"]
    body.layers[1].mlp.__dict__["_hf_hook"] = Hook()  # with weights offloaded, the hook says where it computes
    call = Call(body, (), {"input_ids": torch.tensor([[5, 9]])})
    body.lora_default.put_in(body, call)
    assert {layer.keys.device.type for layer in call.cache.layers} == {"cpu"}


class Hook:
    execution_device = "cpu"


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_an_adapter_that_is_active_does_not_change_the_start_of_another(kind):
    config = lk.LoraConfig(variant=kind, virtual_tokens=3, prompt_text=[6, 11, 30])
    alone = lk.capture(lk.attach(tiny.llama(), config)).updates["base_model"]
    model = lk.attach(
        tiny.llama(), lk.LoraConfig(rank=2, targets=["embed_tokens", "k_proj"], prompt="prefix", virtual_tokens=2)
    )
    tiny.randomise_factors(model)
    lk.attach(model, config, "second")
    beside = lk.capture(model, "second").updates["base_model"]
    assert torch.equal(beside.embeddings, alone.embeddings)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_on_an_offloaded_model_they_start_as_the_same_tokens(kind):
    """accelerate keeps weights on "meta" between calls, so rows of the embedding's weight cannot be taken."""
    from accelerate import cpu_offload

    config = lk.LoraConfig(variant=kind, virtual_tokens=3, prompt_text=[6, 11, 30])
    ids = torch.tensor([[5, 9, 3]])
    here = lk.attach(tiny.llama(), config)
    model = lk.attach(cpu_offload(tiny.llama(), execution_device=torch.device("cpu")), config)
    assert model.model.embed_tokens.weight.is_meta
    assert torch.equal(model.model.lora_default.embeddings, here.model.lora_default.embeddings)
    assert torch.equal(model(input_ids=ids).logits, here(input_ids=ids).logits)
