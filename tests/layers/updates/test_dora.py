"""DoRA on live modules: PEFT's values and gradients, its equation in float64, and g never out of date."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.errors import AdapterError, StateError
from lorakit.layers.updates.dora import DoraFactors
from lorakit.model.training import faster_parameters

LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), lambda: torch.randn(3, 5, 40)),
    "linear without bias": (lambda: nn.Linear(200, 220, bias=False), lambda: torch.randn(3, 200)),
    "Conv1D": (lambda: Conv1D(30, 40), lambda: torch.randn(3, 5, 40)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), lambda: torch.randn(2, 8, 9, 9)),
    "large conv2d": (lambda: nn.Conv2d(40, 44, 3), lambda: torch.randn(1, 40, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), lambda: torch.randn(2, 3, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(50, 16), lambda: torch.randint(0, 50, (3, 7))),
}


def built(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module, x = LAYERS[layer]
    return nn.Sequential(module()), x()


def randomise(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    update: DoraFactors = model[0]._modules[f"lora_{name}"]
    with torch.no_grad():
        for key, p in update.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.copy_(p * (1 + 0.3 * noise) if key == "magnitude" else 0.3 * noise)
    return model


def config(**settings) -> lk.LoraConfig:
    return lk.LoraConfig(**{"variant": "dora", "rank": 4, "alpha": 8.0, "targets": ["0"]} | settings)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


# ---------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_are_pefts_in_both_directions(layer, training, tmp_path):
    base, x = built(layer)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, use_dora=True, fan_in_fan_out=layer == "Conv1D"),
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(p * (1 + 0.3 * torch.randn_like(p)) if "magnitude" in name else 0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.attach(copy.deepcopy(base), lk.Adapter.load(tmp_path / "theirs"), trainable=True)
    ours.train(training), theirs.train(training)
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    outputs = ours(inputs[0]), theirs(inputs[1])
    assert relative(outputs[0], outputs[1]) < 1e-6
    gradient = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(gradient)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for key, p in ours[0].lora_default.named_parameters():
        part = {"inner.A": "_A", "inner.B": "_B", "magnitude": "magnitude"}[key]
        theirs_of_it = next(g for name, g in expected.items() if part in name)
        assert relative(p.grad.flatten(), theirs_of_it.flatten()) < 1e-6
    if x.is_floating_point():
        assert relative(inputs[0].grad, inputs[1].grad) < 1e-6

    lk.capture(ours).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").train(training)
    assert relative(ours(x), again(x)) < 1e-6


def test_dropout_is_of_the_update_alone_where_peft_drops_inputs_of_the_base_too():
    base, x = built("linear")
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, use_dora=True, lora_dropout=0.5)
    ).train()
    ours = lk.attach(copy.deepcopy(base), config(dropout=0.5)).train()
    with torch.no_grad():  # B is zero, so no dropped input reaches D
        ours[0].lora_default.magnitude.mul_(1.5)
        theirs.base_model.model[0].lora_magnitude_vector.default.weight.mul_(1.5)
    linear = base(x) - base[0].bias
    torch.testing.assert_close(ours(x), base(x) + 0.5 * linear)
    assert relative(theirs(x), base(x) + 0.5 * linear) > 0.1
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_language_models_gradients_are_pefts(tmp_path):
    """Also through the gated MLP, which is one node."""
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    theirs = peft.get_peft_model(
        tiny.llama(dtype=torch.float64), peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, use_dora=True)
    )
    theirs.double().train()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(p * (1 + 0.3 * torch.randn_like(p)) if "magnitude" in name else 0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = lk.attach(tiny.llama(dtype=torch.float64), lk.Adapter.load(tmp_path), trainable=True).train()
    ids = torch.randint(3, tiny.VOCAB, (2, 12))
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    for name, p in ours.named_parameters():
        if p.requires_grad:
            key = name.replace("lora_default.inner.", "lora_").replace(
                "lora_default.magnitude", "lora_magnitude_vector"
            )
            key = key.replace(
                "embed_tokens.lora_", "embed_tokens.lora_embedding_" if key[-1] in "AB" else "embed_tokens.lora_"
            )
            assert relative(p.grad.flatten(), gradients[key].flatten()) < 1e-10, name


# ---------------------------------------------------------------------------------- its equation


@pytest.mark.parametrize("layer", ["linear", "linear without bias"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("base_trains", [False, True], ids=["one node", "several nodes"])
def test_gradients_take_the_norm_as_a_constant(layer, weight, base_trains):
    model, x = built(layer)
    model, x = model.double(), x.double().requires_grad_()
    randomise(lk.attach(model, config()))
    lk.activate(model, {"default": weight})
    model[0].weight.requires_grad_(base_trains)
    update, W, b = model[0].lora_default, model[0].weight, model[0].bias
    A, B, m = update.inner.A, update.inner.B, update.magnitude
    V = W + 2.0 * B @ A
    changed = W + weight * (m * V / V.norm(dim=1, keepdim=True).detach() - W)
    expected = nn.functional.linear(x, changed, b)
    found = model(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, A, B, m, *([W] if base_trains else [])]
    gradient = torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_in_bfloat16_it_is_as_near_to_float64_as_the_changed_weight():
    model, x = built("linear without bias")
    randomise(lk.attach(model, config()))
    exact = model(x).double()
    model[0].to(torch.bfloat16)
    update: DoraFactors = model[0].lora_default.float()
    found = model(x.bfloat16()).double()
    assert relative(found, exact) < 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x.bfloat16()).double(), found, rtol=0.02, atol=0.02)
    assert update.magnitude.dtype == torch.float32


def test_a_row_of_zeros_stays_zero():
    model, x = built("linear")
    with torch.no_grad():
        model[0].weight[3] = 0
    before = model(x)
    lk.attach(model, config())
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model[0].lora_default.parameters())


def test_gradient_checkpointing_and_compile_compute_the_same():
    model, x = built("linear without bias")
    randomise(lk.attach(model, config()))
    parameters = list(model[0].lora_default.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        for p in parameters:
            p.grad = None
        y.square().sum().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


# ---------------------------------------------------------------------------------- with other settings


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_it_starts_from_the_weight_as_a_lora_does(init):
    model, x = built("linear")
    before = model(x)
    lk.attach(model, config(init=init))
    assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    value = lk.capture(model).updates["0"]
    assert (value.variant, value.rank) == ("dora", 8)  # the start is subtracted
    again = lk.attach(built("linear")[0], lk.capture(model))
    torch.testing.assert_close(again(x), model(x))
    assert not torch.allclose(model(x), before, atol=1e-2)


def test_lora_plus_and_freeze_a_apply_to_its_parts():
    model, x = built("linear")
    lk.attach(model, config(lora_plus=16.0))
    update: DoraFactors = model[0].lora_default
    assert faster_parameters(model) == {update.inner.B, update.magnitude}
    lk.detach(model)
    lk.attach(model, config(freeze_a=True))
    model(x).sum().backward()
    trained = {name for name, p in model[0].lora_default.named_parameters() if p.grad is not None}
    assert trained == {"inner.B", "magnitude"}


# ---------------------------------------------------------------------------------- refused


def test_pefts_grouped_form_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    inner = Factors(torch.randn(4, 4, 3, 3), torch.randn(6, 2, 1, 1), 4.0, "conv", groups=2)
    value = lk.Adapter(lk.LoraConfig(targets=["0"]), {"0": Dora(inner, torch.rand(6, 1))})
    with pytest.raises(AdapterError, match="'0' is a DoRA of a grouped convolution in PEFT's form"):
        lk.attach(model, value)


@pytest.mark.parametrize(
    "inner",
    [
        Factors(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 4.0, "conv"),
        Loha(torch.randn(6, 2), torch.randn(2, 36), torch.randn(6, 2), torch.randn(2, 36), 4.0, shape=(6, 4, 3, 3)),
    ],
)
def test_a_magnitude_for_each_input_of_a_kernel_is_refused(inner):
    value = lk.Adapter(lk.LoraConfig(targets=["0"]), {"0": Dora(inner, torch.rand(1, 36))})
    with pytest.raises(AdapterError, match="a magnitude for each input of a convolution's kernel"):
        lk.attach(nn.Sequential(nn.Conv2d(4, 6, 3)), value)


def test_a_weight_that_is_offloaded_is_refused_and_the_module_left_as_it_was():
    from accelerate import cpu_offload

    model = cpu_offload(nn.Sequential(nn.Linear(40, 30)), execution_device="cpu")
    with pytest.raises(StateError, match="'0' is offloaded, and DoRA starts from the norms"):
        lk.attach(model, config())
    assert type(model[0]) is nn.Linear
