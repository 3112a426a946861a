"""DoRA over other kinds and bases, by input, and merged: values from files, and weights restored to the bit."""

from __future__ import annotations

import copy

import pytest
import quantized
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.adapter.vera import Projection, Vera
from lorakit.layers.updates.dora import DoraFactors


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def live(module: nn.Module, value: Dora, **settings) -> nn.Module:
    model = nn.Sequential(module)
    return lk.attach(model, lk.Adapter(lk.LoraConfig(targets=["0"]), {"0": value}), **settings)


def changed(model: nn.Module) -> nn.Module:
    """The module with its weight changed as the value says."""
    module = copy.deepcopy(model)
    value = lk.capture(model).updates["0"]
    lk.detach(module)
    W = module[0].weight.detach()
    every = slice(0, len(W))
    rows = value.rows(tuple(W.shape), model[0].lora_transposed, read=lambda: [(every, W.flatten(1))])
    with torch.no_grad():
        W += rows(every, W.flatten(1)).view_as(W)
    return module


def linear(out: int = 8, inputs: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, out).double()


LOW = Factors(0.4 * randn(3, 10), 0.4 * randn(8, 3), 6.0)
LOHA = Loha(randn(8, 2), randn(2, 10), randn(8, 2, seed=1), randn(2, 10, seed=1), 1.0)
LOKR = Lokr(9.0, w1=0.4 * randn(2, 5), w2=0.4 * randn(4, 2))
CONV_LOHA = Loha(randn(6, 2), randn(2, 36), randn(6, 2, seed=1), randn(2, 36, seed=1), 1.0, shape=(6, 4, 3, 3))
EMBEDDED = Factors(0.4 * randn(3, 12), 0.4 * randn(8, 3), 6.0, "embedding")
ONE = Factors(0.4 * randn(3, 4, 1, 1), 0.4 * randn(6, 3, 1, 1), 6.0, "conv")
KINDS = {
    "by input": (linear, Dora(LOW, randn(1, 10).abs())),
    "by input, of a square weight": (
        lambda: linear(10),
        Dora(Factors(0.4 * randn(3, 10), 0.4 * randn(10, 3), 6.0), randn(1, 10).abs()),
    ),
    "by output, of a square weight": (
        lambda: linear(10),
        Dora(Factors(0.4 * randn(3, 10), 0.4 * randn(10, 3), 6.0), randn(10, 1).abs()),
    ),
    "by input, of a Conv1D": (
        lambda: Conv1D(8, 10).double(),
        Dora(Factors(0.4 * randn(3, 10), 0.4 * randn(8, 3), 6.0, transposed=True), randn(1, 10).abs()),
    ),
    "by input, of a 1x1 convolution": (lambda: nn.Conv2d(4, 6, 1).double(), Dora(ONE, randn(1, 4).abs())),
    "by token, of an embedding": (lambda: nn.Embedding(12, 8).double(), Dora(EMBEDDED, randn(1, 12).abs())),
    "over a LoHa": (linear, Dora(LOHA, randn(8, 1).abs())),
    "over a LoKr": (linear, Dora(LOKR, randn(8, 1).abs())),
    "over a LoKr, by input": (linear, Dora(LOKR, randn(1, 10).abs())),
    "over a LoHa, by input": (linear, Dora(LOHA, randn(1, 10).abs())),
    "over a LoHa, of a convolution": (lambda: nn.Conv2d(4, 6, 3).double(), Dora(CONV_LOHA, randn(6, 1).abs())),
}


def input_of(model: nn.Module) -> Tensor:
    module = model[0]
    if isinstance(module, nn.Embedding):
        return torch.tensor([[1, 2, 3], [0, 11, 2], [5, 5, 5]])
    return randn(3, 4, 5, 5) if isinstance(module, nn.Conv2d) else randn(3, 5, 10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_changed_weight_does(kind, training):
    module, value = KINDS[kind]
    model = live(module(), value).train(training)
    x = input_of(model)
    torch.testing.assert_close(model(x), changed(model)(x), rtol=1e-9, atol=1e-9)
    again = lk.capture(model).updates["0"]
    assert again.by_output == value.by_output
    assert again.magnitude.shape == value.magnitude.shape
    base = model[0].weight.clone()
    y = model(x)
    lk.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    assert torch.allclose(model[0].weight, changed_weight(model, base, value), rtol=1e-9, atol=1e-9)
    lk.unmerge(model)
    assert torch.equal(model[0].weight, base)
    with lk.route(model, ["default", None, {"default": 0.5}]):
        rows = model(x)
    torch.testing.assert_close(rows[0], y[0], rtol=1e-9, atol=1e-9)
    lk.activate(model, None)
    torch.testing.assert_close(rows[2], (y + model(x))[2] / 2, rtol=1e-9, atol=1e-9)


def changed_weight(model: nn.Module, base: Tensor, value: Dora) -> Tensor:
    every = slice(0, len(base))
    rows = value.rows(tuple(base.shape), model[0].lora_transposed, read=lambda: [(every, base.flatten(1))])
    return base + rows(every, base.flatten(1)).view_as(base)


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_take_the_norm_as_a_constant(kind, monkeypatch):
    module, value = KINDS[kind]
    model = live(module(), value, trainable=True)
    held = model[0].lora_default.norm(model[0])
    monkeypatch.setattr(model[0].lora_default, "norm", lambda _: held)
    x = input_of(model)
    inputs = [*model[0].lora_default.parameters(), *([x.requires_grad_()] if x.is_floating_point() else [])]
    assert torch.autograd.gradcheck(lambda *_: model(x), inputs)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("out", [8, 10])
def test_a_file_of_kohya_keeps_its_axis_live_and_merged_into_files(axis, out, tmp_path):
    """ "dora_scale" of LyCORIS is [out, 1] or [1, in], which for a square weight its shape alone tells."""
    f = Factors(0.4 * randn(3, 10), 0.4 * randn(out, 3), 6.0)
    size = (out, 1) if axis == 0 else (1, 10)
    scale = randn(*size).abs()
    tensors = {"lora_down.weight": f.A, "lora_up.weight": f.B, "alpha": torch.tensor(6.0), "dora_scale": scale}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.{name}": t.float().contiguous() for name, t in tensors.items()}, tmp_path / "a.safetensors")
    (value,) = lk.Adapter.load(tmp_path / "a.safetensors").updates.values()
    model = live(linear(out).float(), value)
    W, D = model[0].weight, 2.0 * (f.B @ f.A).float()
    V = W + D
    expected = scale.float() * V / V.norm(dim=1 - axis, keepdim=True)
    x = randn(4, 10).float()
    torch.testing.assert_close(model(x), x @ expected.T + model[0].bias, rtol=1e-5, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-6, atol=1e-6)


def test_torchs_own_attention_computes_with_the_changed_weights():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attention", nn.MultiheadAttention(8, 2, batch_first=True).double())
    nn.init.normal_(model.attention.out_proj.bias)
    values = {
        "attention": Dora(Factors(0.4 * randn(3, 8), 0.4 * randn(24, 3), 6.0), randn(24, 1).abs()),
        "attention.out_proj": Dora(Loha(randn(8, 2), randn(2, 8), randn(8, 2, seed=1), randn(2, 8), 1.0), randn(8, 1)),
    }
    lk.attach(model, lk.Adapter(lk.LoraConfig(targets=["attention", "out_proj"]), values))
    x = randn(2, 5, 8)
    for weight in (1.0, -0.5):
        lk.activate(model, {"default": weight})
        y, _ = model.attention(x, x, x)
        lk.merge(model)
        torch.testing.assert_close(model.attention(x, x, x)[0], y, rtol=1e-9, atol=1e-9)
        lk.unmerge(model)


@pytest.mark.parametrize("parts", [[True, False, True], [True, True, True]])
def test_a_packed_projection_has_a_magnitude_for_all_of_its_outputs(parts):
    model = tiny.gpt2()
    lk.attach(model, lk.LoraConfig(variant="dora", targets=["c_attn"], packed={"c_attn": parts}, rank=2))
    ids = torch.randint(3, tiny.VOCAB, (2, 6))
    lk.activate(model, None)
    before = model(ids).logits
    lk.activate(model, "default")
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    y = model(ids).logits
    value = lk.capture(model)
    assert {tuple(u.magnitude.shape) for u in value.updates.values()} == {(48, 1)}
    plain = lk.attach(tiny.gpt2(), value)
    torch.testing.assert_close(plain(ids).logits, y)
    lk.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantized_base_the_norm_is_that_of_its_dense_weight(bits):
    torch.manual_seed(0)
    W, b = torch.randn(32, 64), torch.randn(32)
    module = quantized.linear4(W, b) if bits == 4 else quantized.linear8(W, b)
    dense = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    from lorakit.layers.bases import base_of

    with torch.no_grad():
        dense[0].weight.copy_(base_of(module).dense(module)), dense[0].bias.copy_(b)
    model = lk.attach(nn.Sequential(module), lk.LoraConfig(variant="dora", targets=["0"], rank=4))
    before = model(torch.ones(1, 64))
    lk.activate(model, None)
    assert torch.equal(model(torch.ones(1, 64)), before)
    lk.activate(model, "default")
    with torch.no_grad():
        for name, p in model[0].lora_default.named_parameters():
            p.copy_(p * (1 + 0.3 * torch.randn_like(p)) if name == "magnitude" else 0.3 * torch.randn_like(p))
    other = lk.attach(dense, lk.capture(model), trainable=True, force=True)
    x = torch.randn(3, 5, 64)
    gradients = []
    for each in (model, other):
        each.train()
        y = each(x)
        parameters = list(each[0].lora_default.parameters())
        gradients.append((y, *torch.autograd.grad(y.square().sum(), parameters)))
    for own, expected in zip(*gradients, strict=True):
        assert float(((own - expected).abs().max() / expected.abs().max()).detach()) < (1e-5 if bits == 4 else 3e-2)
    with torch.no_grad(), lk.route(model.eval(), ["default", None, "default"]):
        rows = model(x)
    with torch.no_grad():
        torch.testing.assert_close(
            rows[0], model(x)[0], rtol=1e-3 if bits == 4 else 5e-2, atol=1e-3 * 10 ** (bits // 4)
        )


# ---------------------------------------------------------------------------------- merging


def several(dtype: torch.dtype) -> nn.Module:
    """A linear with three DoRA and a LoRA, of the size that training gives them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 100)).to(dtype)
    for name, variant in (("a", "dora"), ("b", "dora"), ("c", "dora"), ("d", "lora")):
        lk.attach(model, lk.LoraConfig(variant=variant, targets=["0"], rank=8), name=name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(p * (1 + 0.05 * torch.randn_like(p)) if "magnitude" in name else 0.02 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_merges_of_several_adapters_leave_every_bit(dtype):
    model = several(dtype)
    before = model[0].weight.clone()
    x = torch.randn(4, 800).to(dtype)
    mixes = ["a", "b", {"a": 0.7, "b": -0.3}, {"c": 1.0, "d": 0.5}, {"a": 2.0, "b": 1.0, "c": -1.0, "d": 1.0}]
    for cycle in range(20):
        lk.activate(model, mixes[cycle % len(mixes)])
        y = model(x)
        lk.merge(model)
        assert not torch.equal(model[0].weight, before)
        tolerance = 2e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)
        lk.unmerge(model)
        assert torch.equal(model[0].weight, before)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undoing_takes_as_many_bits_as_a_loras(dtype):
    def kept(name: str) -> int:
        model = several(dtype)
        lk.activate(model, name)
        lk.merge(model)
        return model[0].lora_merged.nbytes()

    assert kept("a") <= 1.1 * kept("d")


def test_factors_that_changed_since_the_merge_are_noticed():
    model = several(torch.float32)
    lk.activate(model, "a")
    lk.merge(model)
    merged = model[0].weight.clone()
    with torch.no_grad():
        model[0].lora_a.inner.B.mul_(2)
    with pytest.raises(lk.errors.StateError, match="the adapter's factors have changed"):
        lk.unmerge(model)
    assert torch.equal(model[0].weight, merged)


def test_a_factor_of_zero_leaves_nothing_of_the_weight_and_is_undone():
    model = several(torch.float32)
    update: DoraFactors = model[0].lora_a
    with torch.no_grad():
        update.magnitude[3] = 0
        update.magnitude[5] *= -1
    before = model[0].weight.clone()
    lk.activate(model, "a")
    lk.merge(model)
    assert not model[0].weight[3].any()
    lk.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_a_magnitude_for_each_input_computes_in_the_activations_precision_on_a_quantized_base():
    """Its dense weight is float32; the activations must not become so."""
    torch.manual_seed(0)
    W = torch.randn(8, 64)
    module = quantized.linear8(W)
    inner = Factors(0.1 * torch.randn(3, 64), 0.1 * torch.randn(8, 3), 6.0)
    model = live(module, Dora(inner, W.norm(dim=0, keepdim=True) * 1.1))
    applied: list[torch.dtype] = []
    own = type(model[0]).lora_apply

    def seen(self, x: Tensor, weight: Tensor) -> Tensor:
        applied.append(weight.dtype)
        return own(self, x, weight)

    model[0].lora_apply = seen.__get__(model[0])
    y = model(torch.randn(2, 64, dtype=torch.bfloat16))
    assert applied == [torch.bfloat16]
    assert y.dtype == torch.bfloat16


def test_veras_without_matrices_share_them_also_inside_of_a_dora():
    """As the files have them without PEFT's matrices: drawn once, for the largest of all."""

    def veras(projection: Projection) -> dict[str, Vera]:
        return {
            "0": Vera(torch.rand(3), torch.rand(8), projection, 10),
            "1": Vera(torch.rand(3), torch.rand(12), projection, 8),
        }

    def attached(projection: Projection) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12))
        own = veras(projection)
        updates = {"0": Dora(own["0"], torch.rand(8, 1)), "1": own["1"]}
        return lk.attach(model, lk.Adapter(lk.LoraConfig(targets=["0", "1"]), updates))

    drawn, given = attached(Projection(5)), attached(Projection.drawn(5, 3, 12, 10))
    x = torch.randn(2, 10)
    assert torch.equal(drawn(x), given(x))
