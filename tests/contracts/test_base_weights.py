"""What every way of storing a base's weight promises. A new one is a row of STORED."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import packed_checkpoints as checkpoints
import pytest
import quantized
import quantized_modules as modules
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
    say only how near it must be. `near`: of what is left of the weight, relative to the largest. The others: see below.
    """

    make: Callable[[Tensor], nn.Module]
    exact: Callable[[Tensor], Tensor] | None
    near: float
    layout: Callable[[Tensor], Tensor] = lambda W: W
    quantized: bool = True
    spread: float = 1.0  # how many times half a step the method may move an element
    copied: bool = True  # whether the library's modules can be copied by copy.deepcopy
    pickled: bool = True  # ... and by pickle


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


def packed(how: dict, was_conv1d: bool = False, spread: float = 1.0) -> Stored:
    """lorakit's own linear."""

    def turned(W: Tensor) -> Tensor:
        return W.T.contiguous() if was_conv1d else W

    def by_hand(W: Tensor) -> Tensor:
        return turned(checkpoints.by_hand(checkpoints.packed(turned(W), how), how))

    near = 0.005 if how["bits"] == 8 else 0.1
    return Stored(lambda W: modules.packed(turned(W), BIAS, how, was_conv1d), by_hand, near, turned, spread=spread)


GPTQ4 = checkpoints.gptq_config(desc_act=True, sym=False)
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
    "GPTQ 4 bits, activation order": packed(GPTQ4, spread=6),
    "GPTQ 8 bits, second format": packed(checkpoints.gptq_config(bits=8, checkpoint_format="gptq_v2"), spread=6),
    "GPTQ 4 bits of a Conv1D": packed(GPTQ4, was_conv1d=True, spread=6),
    "GPTQ 4 bits, gptqmodel's switch": Stored(lambda W: modules.gptqmodel(W, BIAS), None, 0.1, spread=6),
    "AWQ": packed(checkpoints.awq_config()),
    "torchao int8": Stored(lambda W: modules.torchao(W, BIAS), None, 5e-3, pickled=False),
    "torchao 4 bits": Stored(lambda W: modules.torchao(W, BIAS, "intx4"), None, 0.1, pickled=False),
    "torchao float8": Stored(lambda W: modules.torchao(W, BIAS, "float8"), None, 0.07, pickled=False),
    "quanto int8": Stored(lambda W: modules.quanto(W, BIAS), None, 5e-3, copied=False, pickled=False),
    "quanto float8": Stored(lambda W: modules.quanto(W, BIAS, "qfloat8"), None, 0.07, copied=False, pickled=False),
    "HQQ 4 bits": Stored(lambda W: modules.hqq(W, BIAS), None, 0.12, spread=2),
    "HQQ 4 bits, axis 0": Stored(lambda W: modules.hqq(W, BIAS, axis=0), None, 0.12, spread=2),
    "compressed-tensors 4 bits": Stored(lambda W: modules.compressed(W, BIAS), None, 0.1),
    "compressed-tensors 8 bits": Stored(lambda W: modules.compressed(W, BIAS, 8), None, 5e-3),
    "compressed-tensors float8": Stored(lambda W: modules.compressed(W, BIAS, 8, "float"), None, 0.07),
}


def pairs() -> list[tuple[str, str]]:
    """Each quantized one beside the unquantized, itself and the next two, of the same class."""
    found = []
    for name in (name for name, stored in STORED.items() if stored.quantized):
        alike = [other for other in STORED if ("Conv1D" in name) is ("Conv1D" in other)]
        at = alike.index(name)
        others = [n for n in alike if not STORED[n].quantized] + [alike[(at + i) % len(alike)] for i in range(3)]
        found += [(name, other) for other in dict.fromkeys(others)]
    return found


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
    assert errors.max() <= 0.2 * stored.spread * W.abs().max()
    assert errors.mean() < 4 * stored.spread * apart.mean()


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "after an evaluation without gradients"])
@pytest.mark.parametrize("name", STORED)
def test_values_and_gradients_are_those_of_the_dense_weight(name, evaluated):
    """Some libraries repack a weight in the first evaluation, for a kernel that passes no gradients."""
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
    if evaluated:
        with torch.no_grad():
            model.eval()(x.detach())
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
    stored, _, module = own(name)
    plain = nn.Sequential(module)
    before, picture = tiny.bits(plain), tiny.picture(plain)
    settings = {
        "bottleneck": {"alpha": 32.0},
        "ia3": {"rank": 16, "alpha": 32.0},
        "tokens": {"trainable_tokens": list(range(OUT))},
        "vera": {"rank": 64, "alpha": 32.0},
    }.get(variant, {})
    rate = {"ia3": 0.1, "vera": 0.1, "lokr": 0.03}.get(variant, 0.01)  # those with few parameters learn in larger steps
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
    assert losses[-1] < (0.95 if variant == "ia3" else 0.8) * losses[0]  # factors of outputs reach few targets
    trained = lk.capture(model)
    trained.check()
    y = model.eval()(x)
    if stored.copied:
        assert torch.equal(copy.deepcopy(model)(x), y)
    if stored.pickled:
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
        kind = re.escape(base_of(model[0]).quantization)
        with pytest.raises(StateError, match=rf"'0' is quantized \({kind}\)(.|\n)*lorakit merge BASE"):
            lk.merge(model)
    else:
        lk.merge(model)
        assert not tiny.same_bits(tiny.bits(model), before)
        lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), before)


@pytest.mark.parametrize("name, other", pairs())
def test_an_adapter_goes_to_the_same_base_however_it_is_stored(name, other):
    """Both ways; and another base is refused both ways."""
    stored, counterpart = STORED[name], STORED[other]
    # Where a method moves elements far, sixteen elements do not tell two bases apart. A model has more weights.
    count = 4 if max(stored.spread, counterpart.spread) > 1 else 1

    def weights(stored: Stored, seed: int) -> dict:
        found = {}
        for i in range(count):
            module = stored.make(stored.layout(weight(seed + 100 * i)))
            found[f"w{i}"] = fingerprinted(module) if base_of(module).quantization else module.weight
            found[f"bias{i}"] = module.bias
        return found

    def same(first: dict, second: dict) -> bool:
        lines = differences(fingerprint(first, "Net"), second, "Net")
        assert set(lines) <= {f"weights: w{i} holds other values" for i in range(count)}
        return not lines

    one, again = weights(stored, 0), weights(counterpart, 0)
    assert same(one, again)
    assert same(again, one)
    for seed in range(11, 16):
        stranger = weights(counterpart, seed)
        assert not same(one, stranger)
        assert not same(stranger, one)


@pytest.mark.parametrize("name", STORED)
def test_fresh_factors_are_of_full_precision(name):
    _, _, module = own(name)
    assert master_dtype(module) == (torch.float64 if name == "dense float64" else torch.float32)
