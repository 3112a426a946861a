"""What every way of storing a base's weight promises. A new one is a row of STORED."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import quantized
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.fingerprint import differences, fingerprint
from lorakit.config import variants
from lorakit.errors import StateError, TargetError
from lorakit.layers.bases import base_of, fingerprinted, parameter_count
from lorakit.layers.updates.update import device_of, master_dtype

OUT, IN = 32, 64


def weight(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (OUT, IN)), generator=torch.Generator().manual_seed(seed)) * 0.05


BIAS = weight(1, OUT)


@dataclass(frozen=True)
class Stored:
    """`make`: a module of this weight, which is in the layout of the unquantized module (`layout` of [out, in]).
    `exact`: what the storage makes of the weight, in float64, by the equations, not by the library; None where these
    say only how near it must be. `near`: of what is left of the weight, relative to the largest.
    """

    make: Callable[[Tensor], nn.Module]
    exact: Callable[[Tensor], Tensor] | None
    near: float
    layout: Callable[[Tensor], Tensor] = lambda W: W
    quantized: bool = True


def linear(W: Tensor) -> nn.Module:
    module = nn.Linear(IN, OUT, dtype=W.dtype).requires_grad_(False)
    module.weight.copy_(W)
    module.bias.copy_(BIAS)
    return module.eval()


def conv1d(W: Tensor) -> nn.Module:
    module = Conv1D(OUT, IN).requires_grad_(False)
    module.weight.copy_(W)
    module.bias.copy_(BIAS)
    return module.eval()


def conv1d_in_4_bits(W: Tensor) -> nn.Module:
    """As transformers quantizes it."""
    module = quantized.linear4(W.T.contiguous(), BIAS)
    module.source_cls = Conv1D
    return module


STORED = {
    "dense float32": Stored(linear, lambda W: W.double(), 0.0, quantized=False),
    "dense bf16": Stored(lambda W: linear(W.bfloat16()), lambda W: W.bfloat16().double(), 4e-3, quantized=False),
    "dense float64": Stored(lambda W: linear(W.double()), lambda W: W.double(), 0.0, quantized=False),
    "Conv1D": Stored(conv1d, lambda W: W.double(), 0.0, lambda W: W.T.contiguous(), quantized=False),
    "bitsandbytes nf4": Stored(lambda W: quantized.linear4(W, BIAS), quantized.nf4_by_hand, 0.16),
    "bitsandbytes nf4 of a Conv1D": Stored(
        conv1d_in_4_bits, lambda W: quantized.nf4_by_hand(W.T.contiguous()).T, 0.16, lambda W: W.T.contiguous()
    ),
    "bitsandbytes nf4, double quantization": Stored(lambda W: quantized.linear4(W, BIAS, double=True), None, 0.18),
    "bitsandbytes fp4": Stored(lambda W: quantized.linear4(W, BIAS, kind="fp4"), None, 0.18),
    "bitsandbytes int8": Stored(lambda W: quantized.linear8(W, BIAS), quantized.int8_by_hand, 5e-3),
}
# Each quantized one beside every way to store the same weight of the same class.
PAIRS = [
    (name, other)
    for name, stored in STORED.items()
    for other in STORED
    if stored.quantized and ("Conv1D" in name) is ("Conv1D" in other)
]


def own(name: str, seed: int = 0) -> tuple[Stored, Tensor, nn.Module]:
    """A row, the unquantized weight and the module."""
    stored = STORED[name]
    W = stored.layout(weight(seed))
    return stored, W, stored.make(W)


def as_linear(module: nn.Module) -> Tensor:
    """The dense weight as [out, in], float64."""
    W = base_of(module).dense(module).double()
    return W.T if isinstance(module, Conv1D) else W


def adapted(module: nn.Module, **config) -> nn.Module:
    """A model with this one module, adapted."""
    return lk.attach(nn.Sequential(module), lk.LoraConfig(**{"rank": 4, "alpha": 8, "targets": ["0"], **config}))


@pytest.mark.parametrize("name", STORED)
def test_the_dense_weight_is_what_the_equations_say(name):
    stored, W, module = own(name)
    base = base_of(module)
    dense = base.dense(module)
    original = W.T if base.was_transposed(module) else W
    assert base.shape(module) == tuple(dense.shape) == tuple(original.shape)
    assert parameter_count(module) == W.numel() + OUT
    assert (base.quantization is not None) is stored.quantized
    assert base.device(module) == torch.device("cpu") == device_of(module)
    assert base.dtype(module).is_floating_point
    assert (dense.double() - original).abs().max() <= stored.near * original.abs().max()
    if stored.exact is not None:
        exact = stored.exact(W)
        exact = exact.T if base.was_transposed(module) else exact
        torch.testing.assert_close(dense.double(), exact, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", STORED)
def test_the_unquantized_weight_lies_within_what_a_sample_says(name):
    stored, W, module = own(name)
    base, original = base_of(module), W
    original = original.T if base.was_transposed(module) else original
    at = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(3))
    values, errors = base.sample(module, at)
    assert values.dtype == errors.dtype == torch.float32
    torch.testing.assert_close(values, base.dense(module).flatten()[at].float())
    apart = (values - original.flatten()[at]).abs()
    if not stored.quantized:
        assert not errors.any()
        return
    assert (apart <= errors * 1.01 + 1e-4 * W.abs().max()).all()
    # ... and they say little more than that: no error is wider than the widest of 16 codes of that block
    assert errors.max() <= 0.2 * W.abs().max()
    assert errors.mean() < 4 * apart.mean()


@pytest.mark.parametrize("name", STORED)
def test_values_and_gradients_are_those_of_the_dense_weight(name):
    _, _, module = own(name)
    W, dtype = as_linear(module), base_of(module).dtype(module)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # int8 computes in any
    model = tiny.randomise_factors(adapted(module))
    child = model[0].lora_default
    assert child.A.dtype == child.B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    A, B = (p.detach().double().requires_grad_() for p in (child.A, child.B))
    x = weight(5, 3, 7, IN).mul(20).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    g = weight(6, 3, 7, OUT).mul(20)
    y = model.train()(x)  # int8: evaluation quantizes activations too
    exact = F.linear(wide, W, BIAS.to(dtype).double()) + 2 * F.linear(F.linear(wide, A), B)
    (y.double() * g).sum().backward()
    (exact * g).sum().backward()
    loose = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for ours, theirs in ((y, exact), (x.grad, wide.grad), (child.A.grad, A.grad), (child.B.grad, B.grad)):
        assert ours.dtype in (dtype, torch.float32)
        distance = (ours.double() - theirs).norm() / theirs.norm()
        assert distance <= loose, distance


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("variant", variants())
def test_every_kind_of_update_trains_on_it_and_leaves_its_bytes(name, variant):
    _, _, module = own(name)
    plain = nn.Sequential(module)
    before, picture = tiny.bits(plain), tiny.picture(plain)
    settings = {"tokens": {"trainable_tokens": list(range(OUT))}, "vera": {"rank": 64}}.get(variant, {})
    rate = {"vera": 0.1, "lokr": 0.03}.get(variant, 0.01)  # those with few parameters learn in larger steps
    if variant == "tokens" and name == "Conv1D":
        with pytest.raises(TargetError, match="has no row for each token"):
            adapted(module, variant=variant, **settings)
        return
    model = adapted(module, variant=variant, **settings).train()
    dtype = base_of(module).dtype(module)
    x = weight(7, 16, IN).mul(20).to(torch.float32 if dtype == torch.float16 else dtype)
    target = weight(8, 16, OUT).mul(20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(30):
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    trained = lk.capture(model)
    trained.check()
    y = model.eval()(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    lk.detach(model.eval())
    after = tiny.picture(model)
    assert {k: v for k, v in after.items() if k != "training"} == {k: v for k, v in picture.items() if k != "training"}
    assert tiny.same_bits(tiny.bits(model), before)
    lk.attach(model, trained)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", STORED)
def test_merging_writes_exactly_or_says_what_to_do(name):
    stored, _, module = own(name)
    model = tiny.randomise_factors(adapted(module))
    before = tiny.bits(model)
    if stored.quantized:
        with pytest.raises(StateError, match=r"'0' is quantized \(bitsandbytes, (4|8) bits\)(.|\n)*lorakit merge BASE"):
            lk.merge(model)
    else:
        lk.merge(model)
        assert not tiny.same_bits(tiny.bits(model), before)
        lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), before)


@pytest.mark.parametrize("name, other", PAIRS)
def test_an_adapter_goes_to_the_same_base_however_it_is_stored(name, other):
    """Both ways; and another base is refused both ways."""
    stored, W, module = own(name)

    def weights(module: nn.Module) -> dict:
        return {"w": fingerprinted(module) if base_of(module).quantization else module.weight, "bias": module.bias}

    def same(first: nn.Module, second: nn.Module) -> bool:
        lines = differences(fingerprint(weights(first), "Net"), weights(second), "Net")
        assert lines in ([], ["weights: w holds other values"])
        return not lines

    again = STORED[other].make(W)
    assert same(module, again)
    assert same(again, module)
    for seed in range(1, 6):
        stranger = STORED[other].make(stored.layout(weight(seed + 10)))
        assert not same(module, stranger)
        assert not same(stranger, module)


@pytest.mark.parametrize("name", STORED)
def test_fresh_factors_are_of_full_precision(name):
    _, _, module = own(name)
    assert master_dtype(module) == (torch.float64 if name == "dense float64" else torch.float32)
