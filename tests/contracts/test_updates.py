"""What every kind of update promises, as a value and on a live module. A new kind is a line of VALUES and, if it can be
trained, of LIVE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapter.biased import Biased
from lorakit.adapter.dense import Dense, with_halves_swapped
from lorakit.adapter.dora import Dora
from lorakit.adapter.experts import ExpertFactors
from lorakit.adapter.ia3 import Ia3
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.adapter.tokens import Tokens
from lorakit.adapter.update import Update
from lorakit.adapter.vera import Projection, Vera
from lorakit.config import variants
from lorakit.errors import AdapterError, LorakitError
from lorakit.layers.updates.update import LiveUpdate


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


@dataclass(frozen=True)
class Value:
    """`exact`: ΔW in float64 as [out, in·k], of an update in float64 and of W [out, in·k]. `shape`: the weight's, [out,
    in, *k].
    """

    update: Update
    shape: tuple[int, ...]
    exact: Callable[[Update, Tensor], Tensor]

    def delta(self, W: Tensor) -> Tensor:
        return self.exact(self.update.map(lambda _, t: t.double()), W.double())


def product(u, W):
    return u.alpha / u.rank * u.B.flatten(1) @ u.A.flatten(1)


def dora(dim: int, inner=product):
    def exact(u, W):
        V = W + inner(u.inner, W)
        return u.magnitude * V / V.norm(dim=dim, keepdim=True) - W

    return exact


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", t, a, b).flatten(1)


def replaced(u, W):
    """An embedding's tokens are its inputs."""
    new = W.clone()
    new[:, list(u.ids)] = u.weight.T
    return new - W


def hadamard(u, W):
    return 1.5 * (u.w1a @ u.w1b) * (u.w2a @ u.w2b)


LOW = Factors(randn(3, 10), randn(8, 3), 6.0)
LOHA = Loha(randn(8, 2), randn(2, 10), randn(8, 2, seed=1), randn(2, 10, seed=1), 3.0)
VALUES = {
    "lora": Value(LOW, (8, 10), product),
    "lora of a convolution": Value(Factors(randn(3, 4, 2, 3), randn(8, 3, 1, 1), 6.0, "conv"), (8, 4, 2, 3), product),
    "lora scaled by the root of its rank": Value(
        replace(LOW, rslora=True), (8, 10), lambda u, W: 6 / 3**0.5 * u.B @ u.A
    ),
    "dora by output": Value(Dora(LOW, randn(8, 1).abs()), (8, 10), dora(1)),
    "dora by input": Value(Dora(LOW, randn(1, 10).abs()), (8, 10), dora(0)),
    "dora of a convolution": Value(
        Dora(Factors(randn(3, 4, 2, 3), randn(8, 3, 1, 1), 6.0, "conv"), randn(8, 1).abs()), (8, 4, 2, 3), dora(1)
    ),
    "dora over a loha": Value(Dora(LOHA, randn(8, 1).abs()), (8, 10), dora(1, hadamard)),
    "dora over a lokr": Value(
        Dora(Lokr(9.0, w1=randn(2, 5), w2=randn(4, 2)), randn(8, 1).abs()),
        (8, 10),
        dora(1, lambda u, W: torch.kron(u.w1, u.w2)),
    ),
    "loha": Value(LOHA, (8, 10), hadamard),
    "loha of a convolution": Value(
        Loha(randn(8, 2), randn(2, 24), randn(8, 2, seed=1), randn(2, 24, seed=1), 3.0, shape=(8, 4, 2, 3)),
        (8, 4, 2, 3),
        hadamard,
    ),
    "loha in Tucker form": Value(
        Loha(
            randn(2, 8),
            randn(2, 4),
            randn(2, 8, seed=1),
            randn(2, 4, seed=1),
            3.0,
            randn(2, 2, 2, 3),
            randn(2, 2, 2, 3, seed=1),
        ),
        (8, 4, 2, 3),
        lambda u, W: 1.5 * tucker(u.t1, u.w1a, u.w1b) * tucker(u.t2, u.w2a, u.w2b),
    ),
    "lokr": Value(Lokr(9.0, w1=randn(2, 5), w2=randn(4, 2)), (8, 10), lambda u, W: torch.kron(u.w1, u.w2)),
    "lokr of products": Value(
        Lokr(9.0, w1a=randn(2, 3), w1b=randn(3, 5), w2a=randn(4, 3), w2b=randn(3, 2)),
        (8, 10),
        lambda u, W: 3 * torch.kron(u.w1a @ u.w1b, u.w2a @ u.w2b),
    ),
    "lokr in Tucker form": Value(
        Lokr(2.0, w1=randn(2, 2), w2a=randn(2, 4), w2b=randn(2, 2), t2=randn(2, 2, 2, 3)),
        (8, 4, 2, 3),
        lambda u, W: torch.kron(u.w1, tucker(u.t2, u.w2a, u.w2b)),
    ),
    "vera": Value(
        Vera(randn(3), randn(8), Projection.drawn(0, 3, 11, 12), 10),
        (8, 10),
        lambda u, W: u.b[:, None] * u.projection.B[:8].double() @ (u.d[:, None] * u.projection.A[:, :10].double()),
    ),
    "ia3": Value(Ia3(randn(8), other=10), (8, 10), lambda u, W: (u.vector - 1)[:, None] * W),
    "ia3 of the inputs": Value(Ia3(randn(10), True, other=8), (8, 10), lambda u, W: (u.vector - 1) * W),
    "ia3 of a convolution": Value(
        Ia3(randn(8), axes=4, other=4), (8, 4, 2, 3), lambda u, W: (u.vector - 1)[:, None] * W
    ),
    "ia3 of a convolution's inputs": Value(
        Ia3(randn(4), True, axes=4, other=8), (8, 4, 2, 3), lambda u, W: (u.vector - 1).repeat_interleave(6) * W
    ),
    "lora beside a bias": Value(Biased(LOW, randn(8)), (8, 10), lambda u, W: product(u.inner, W)),
    "experts": Value(
        ExpertFactors(randn(2, 3, 10), randn(2, 8, 3), 6.0), (2, 8, 10), lambda u, W: 2 * (u.B @ u.A).flatten(1)
    ),
    "experts, transposed": Value(
        ExpertFactors(randn(2, 3, 10), randn(2, 8, 3), 6.0, transposed=True),
        (2, 10, 8),
        lambda u, W: 2 * (u.B @ u.A).mT.flatten(1),
    ),
    "trained tokens": Value(Tokens((1, 4, 9), randn(3, 8)), (8, 10), replaced),
    "whole": Value(Dense(randn(8, 10)), (8, 10), lambda u, W: u.weight),
}

# The layers that a kind can be trained on, as `on` names them.
LIVE = {
    "adalora": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped"},
    "lora": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped", "embedding"},
    "bottleneck": {"linear", "Conv1D"},
    "ia3": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped"},
    "loha": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped"},
    "lokr": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped"},
    "vera": {"linear", "Conv1D"},
    "tokens": {"embedding", "linear"},
    "dora": {"linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped", "embedding"},
}
# The kinds whose effect no change of a weight has.
UNMERGEABLE = {"bottleneck"}
# The method whose result a kind's gradient takes as a constant, by definition.
DETACHED = {"dora": "norm"}
# The kind that it is as a value, where that is another.
VALUE_OF = {"adalora": "lora"}
# What a kind's config needs besides the targets.
# VeRA and bottleneck adapters have no alpha, and (IA)³ no rank either: the defaults.
NEEDS = {
    "bottleneck": {"alpha": 32.0},
    "ia3": {"rank": 16, "alpha": 32.0},
    "tokens": {"trainable_tokens": [1, 5, 7]},
    "vera": {"alpha": 32.0},
}
# Kinds without dropout.
NO_DROPOUT = {"ia3", "tokens"}


@pytest.fixture(params=VALUES)
def value(request) -> Value:
    return VALUES[request.param]


def weight_of(value: Value) -> Tensor:
    return randn(*value.shape, seed=3)


# ---------------------------------------------------------------------------------- as a value


def test_its_tensors_are_its_fields_and_can_be_changed_all_at_once(value):
    update = value.update
    held = [*vars(update).values(), *vars(getattr(update, "inner", None) or update).values()]
    assert all(any(t is field for field in held) for t in update.tensors().values())
    assert update.parameters == sum(t.numel() for t in update.tensors().values())
    double = update.map(lambda _, t: t.double())
    assert type(double) is type(update)
    assert {t.dtype for t in double.tensors().values()} == {torch.float64}
    assert double.scale == update.scale


def test_it_is_found_sound_and_one_that_is_not_finite_is_refused_with_its_module(value):
    value.update.check("the.module")
    for name in value.update.tensors():
        with pytest.raises(AdapterError, match=r"the\.module"):
            value.update.map(lambda n, t, name=name: t * float("nan") if n == name else t).check("the.module")


def test_delta_is_its_equation(value):
    if value.update.needs_base:
        with pytest.raises(AdapterError, match="depends on the base"):
            value.update.delta()
        return
    found = value.update.delta(value.shape)
    assert found.shape == value.shape
    torch.testing.assert_close(found.flatten(1).double(), value.delta(weight_of(value)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.update.matrix().double(), value.delta(weight_of(value)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_rows_are_its_equation_block_by_block(value, step, transposed):
    if transposed and len(value.shape) > 2:
        pytest.skip("a kernel is stored one way round")
    W = weight_of(value)
    wanted = value.delta(W.flatten(1))
    stored, wanted = (W.T.contiguous(), wanted.T) if transposed else (W, wanted)

    def blocks():
        return [
            (slice(i, min(i + step, len(stored))), stored[i : i + step].flatten(1)) for i in range(0, len(stored), step)
        ]

    transposed = transposed or getattr(value.update, "transposed", False)
    change = value.update.rows(tuple(stored.shape), transposed, read=blocks)
    torch.testing.assert_close(torch.cat([change(*block).double() for block in blocks()]), wanted, rtol=1e-5, atol=1e-5)
    half = value.update.rows(tuple(stored.shape), transposed, weight=-0.5, read=blocks)
    torch.testing.assert_close(
        torch.cat([half(*block).double() for block in blocks()]), -0.5 * wanted, rtol=1e-5, atol=1e-5
    )


def test_its_low_rank_form_and_singular_values_are_those_of_delta(value):
    if value.update.needs_base:
        assert value.update.low_rank() is None
        assert not value.update.without_base().needs_base
        return
    wanted = value.delta(weight_of(value))
    found = value.update.low_rank()
    if found is not None:
        torch.testing.assert_close(found.left @ found.right, wanted, rtol=1e-5, atol=1e-5)
    S = torch.cat([svd.S.double() for svd in value.update.singular_values()])
    torch.testing.assert_close(S.square().sum().sqrt(), wanted.norm(), rtol=1e-5, atol=1e-5)
    matrices = value.update.matrices()
    if matrices is not None:
        with pytest.raises(AdapterError, match="'m' has factors for each of 2 experts"):
            value.update.factor_shapes("m")
        back = value.update.of_matrices(matrices)
        assert all(torch.equal(t, value.update.tensors()[name]) for name, t in back.tensors().items())
        torch.testing.assert_close(back.matrix().double(), wanted, rtol=1e-5, atol=1e-5)
        return
    form = value.update.factor_shapes("m")
    assert (form.inner, form.axes) == (value.shape[1:], len(value.shape))


@pytest.mark.parametrize("weight", [2.0, -0.5, 0.0])
def test_a_multiple_of_it_is_of_its_kind(value, weight):
    if value.update.needs_base:
        with pytest.raises(AdapterError, match=r"'m' (is a DoRA|is an \(IA\)³|has trained tokens)"):
            value.update.times(weight, "m")
        return
    found = value.update.times(weight, "m")
    assert type(found) is type(value.update)
    assert found.is_zero() == (weight == 0)
    torch.testing.assert_close(found.matrix().double(), weight * value.delta(weight_of(value)), rtol=1e-5, atol=1e-5)


def test_halves_swapped_swaps_the_rows_of_delta(value):
    W = weight_of(value)
    swapped = torch.cat(W.chunk(2)[::-1])
    every = slice(0, len(W))
    change = with_halves_swapped(value.update).rows(value.shape, read=lambda: [(every, swapped.flatten(1))])
    wanted = torch.cat(value.delta(W.flatten(1)).chunk(2)[::-1])
    torch.testing.assert_close(change(every, swapped.flatten(1)).double(), wanted, rtol=1e-5, atol=1e-5)


def test_its_factors_are_those_of_its_delta_without_the_base(value):
    factors, inner = value.update.factors, value.update.without_base()
    assert value.update.map_factors(lambda f: replace(f, alpha=2 * f.alpha)).scale == value.update.scale * (
        1 if factors is None else 2
    )
    if factors is not None:
        torch.testing.assert_close(factors.delta(value.shape), inner.delta(value.shape), rtol=0, atol=0)
        assert all(torch.equal(t, value.update.tensors()[name]) for name, t in factors.tensors().items())
    plain = value.update.as_factors()
    if plain is not None:
        torch.testing.assert_close(plain.matrix(), value.update.matrix(), rtol=1e-5, atol=1e-5)


def test_its_sizes_and_output_tensors_are_those_of_its_outputs(value):
    matrices = value.update.matrices()
    assert value.update.sizes == (value.shape[:2] if matrices is None else matrices[0].sizes)
    outputs = value.update.output_tensors()
    if outputs is None:
        # Trained tokens have rows of tokens, experts those of experts, VeRA's rows of B are shared, and (IA)³ of inputs
        # has none.
        others = ("tokens", "vera", "ia3")
        assert "t1" in value.update.tensors() or value.update.variant in others or matrices is not None
        return
    assert all(len(t) * value.update.output_block >= value.shape[0] for t in outputs.values())
    assert outputs.keys() <= value.update.tensors().keys()
    # Without its first block of outputs it is an update of the other outputs.
    block, rows = value.update.output_block, value.shape[0]
    rest = value.update.map(lambda name, t: t[len(t) * block // rows :] if name in outputs else t)
    if getattr(rest, "shape", None) is not None or not value.update.outputs_independent:
        return
    W = weight_of(value).flatten(1)
    change = rest.rows((rows - block, *value.shape[1:]))(slice(0, rows - block), W[block:])
    torch.testing.assert_close(change.double(), value.delta(W)[block:], rtol=1e-5, atol=1e-5)


def test_it_knows_the_weights_that_it_is_for(value):
    assert value.update.layout(value.shape) is bool(getattr(value.update, "transposed", False))
    assert value.update.layout((9, *value.shape[1:])) is None
    assert value.update.unmergeable() is None
    if len(value.shape) == 2:
        assert value.update.layout(value.shape[::-1], file_transposed=True) is True


# ---------------------------------------------------------------------------------- on a live module


def on(layer: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model of one such layer, and three rows for it."""
    torch.manual_seed(0)
    x = randn(3, 5, 10)
    module = {
        "linear": lambda: nn.Linear(10, 8),
        "Conv1D": lambda: Conv1D(8, 10),
        "conv1d": lambda: nn.Conv1d(5, 6, 3),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "conv3d": lambda: nn.Conv3d(2, 4, 2),
        "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1),
        "embedding": lambda: nn.Embedding(12, 8),
    }[layer]()
    if layer == "embedding":
        x = torch.tensor([[1, 2, 3], [0, 11, 2], [5, 5, 5]])
    elif "conv" in layer or layer == "grouped":
        x = randn(*{"conv1d": (3, 5, 9), "conv3d": (3, 2, 4, 4, 4)}.get(layer, (3, 4, 6, 6)))
    return nn.Sequential(module).to(dtype), x.to(dtype) if x.is_floating_point() else x


def config(variant: str, **settings) -> lk.LoraConfig:
    needed = {"variant": variant, "rank": 2, "alpha": 3.0, "targets": ["0"]}
    return lk.LoraConfig(**needed | settings | NEEDS.get(variant, {}))


def child(model: nn.Module, name: str = "default") -> LiveUpdate:
    return getattr(model[0], f"lora_{name}")


def randomise(model: nn.Module, name: str = "default", size: float = 1.0, seed: int = 5) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(child(model, name).parameters()):
            p.copy_(size * randn(*p.shape, seed=seed + i))
    return model


def change_of(value: Update, layer: nn.Module) -> Tensor:
    """ΔW of the layer's weight, in its shape."""
    W = layer.weight.detach()
    every, flat = slice(0, len(W)), W.flatten(1)
    rows = value.rows(tuple(W.shape), layer.lora_transposed, read=lambda: [(every, flat)])
    return rows(every, flat).view_as(W)


PAIRS = [(variant, layer) for variant, layers in LIVE.items() for layer in sorted(layers)]
MERGED = [(variant, layer) for variant, layer in PAIRS if variant not in UNMERGEABLE]


def test_every_kind_that_can_be_trained_has_its_line_here():
    assert set(LIVE) == set(variants())


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_a_fresh_one_changes_nothing_and_learns(variant, layer):
    model, x = on(layer)
    before = model(x)
    lk.attach(model, config(variant))
    assert torch.equal(model(x), before)
    value = child(model).value(model[0])
    if variant in UNMERGEABLE:
        assert value.is_zero()
    else:
        change = change_of(value, model[0])
        # One that depends on the base holds norms of it, rounded to float32.
        assert change.abs().max() <= (1e-7 * model[0].weight.abs().max() if value.needs_base else 0)
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in child(model).parameters())
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_its_gradients_are_those_of_its_values(variant, layer, monkeypatch):
    model, x = on(layer, torch.float64)
    randomise(lk.attach(model, config(variant)), size=0.5)
    if variant in DETACHED:
        held = getattr(child(model), DETACHED[variant])(model[0])
        monkeypatch.setattr(child(model), DETACHED[variant], lambda _: held)
    wanted = list(child(model).parameters())
    assert all(p.dtype == torch.float64 for p in wanted)
    if x.is_floating_point():
        wanted.append(x.requires_grad_())
    assert torch.autograd.gradcheck(lambda *_: model(x), wanted)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("variant, layer", MERGED)
def test_it_computes_what_the_changed_weight_does(variant, layer, weight):
    model, x = on(layer, torch.float64)
    changed = copy.deepcopy(model)
    randomise(lk.attach(model, config(variant)))
    lk.activate(model, {"default": weight})
    with torch.no_grad():
        value = lk.capture(model).updates["0"]
        changed[0].weight += weight * change_of(value, model[0])
        if (own := value.bias_update()) is not None:
            bias = changed[0].bias
            bias += weight * own.rows(tuple(bias.shape))(slice(0, len(bias)), bias[:, None])[:, 0]
    torch.testing.assert_close(model(x), changed(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_captured_and_attached_again_it_is_the_same_to_the_bit(variant, layer):
    model, x = on(layer)
    randomise(lk.attach(model, config(variant)))
    value = lk.capture(model)
    assert value.updates["0"].variant == value.config.variant == VALUE_OF.get(variant, variant)
    again = lk.attach(on(layer)[0], value.check())
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in child(again).parameters())
    twice = lk.capture(again).updates["0"]
    assert all(torch.equal(t, twice.tensors()[name]) for name, t in value.updates["0"].tensors().items())
    # and a copy: training the one leaves the other alone
    randomise(model, seed=50)
    assert not torch.equal(again(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant, layer", MERGED)
def test_merged_it_computes_the_same_and_unmerged_the_weight_has_its_bits(variant, layer, dtype):
    model, x = on(layer, dtype)
    before = model[0].weight.detach().clone()
    randomise(lk.attach(model, config(variant)), size=0.1)
    y = model(x)
    lk.merge(model)
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(
        model(x), y, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=3e-2 if dtype == torch.bfloat16 else 1e-5
    )
    lk.unmerge(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("variant, layer", MERGED)
def test_twenty_merges_leave_every_bit(variant, layer):
    model, _ = on(layer)
    before = model[0].weight.detach().clone()
    randomise(lk.attach(model, config(variant)), size=0.5)
    for _ in range(20):
        lk.merge(model)
        lk.unmerge(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("variant, layer", [pair for pair in PAIRS if pair not in MERGED])
def test_one_that_no_weight_expresses_is_refused_where_a_weight_is_needed(variant, layer):
    model, x = on(layer)
    y = randomise(lk.attach(model, config(variant)))(x)
    before = model[0].weight.detach().clone()
    with pytest.raises(lk.errors.StateError, match=r"'0' has a (.|\n)* keep the adapter beside its base"):
        lk.merge(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(x), y)
    value = lk.capture(model).updates["0"]
    assert value.needs_base
    assert value.low_rank() is None
    assert not value.without_base().needs_base
    calls = [
        value.delta,
        partial(value.times, 2.0, "0"),
        partial(value.factor_shapes, "0"),
        partial(value.rows, (8, 10)),
    ]
    for refused in calls:
        with pytest.raises(AdapterError, match=r"keep the adapter beside|activate the adapter"):
            refused()
    for name in value.tensors():
        nan = value.map(lambda n, t, name=name: t * float("nan") if n == name else t)
        with pytest.raises(AdapterError, match=r"the\.module"):
            nan.check("the.module")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("other", LIVE)
@pytest.mark.parametrize("variant, layer", PAIRS)
def test_rows_of_a_batch_have_it_each_for_itself(variant, layer, other, grad):
    if layer not in LIVE[other]:
        pytest.skip(f"{other} is not for this layer")
    model, x = on(layer)
    randomise(lk.attach(model, config(variant), name="a"), "a")
    randomise(lk.attach(model, config(other, rank=3), name="b", trainable=True), "b", seed=9)
    choices = ["b", None, {"a": 0.5, "b": -2.0}]
    wanted = []
    for row, choice in zip(x, choices, strict=True):
        lk.activate(model, choice)
        wanted.append(model(row[None]))
    with torch.set_grad_enabled(grad), lk.route(model, choices):
        found = model(x)
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    with torch.set_grad_enabled(grad), lk.route(model, ["a", "a", None]):
        found = model(x)
    lk.activate(model, "a")
    torch.testing.assert_close(found[:2], model(x[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", LIVE)
@pytest.mark.parametrize("variant, layer", PAIRS)
def test_two_active_ones_of_whatever_kinds_add_up(variant, layer, other):
    if layer not in LIVE[other]:
        pytest.skip(f"{other} is not for this layer")
    model, x = on(layer, torch.float64)
    base = model(x)
    randomise(lk.attach(model, config(variant), name="a"), "a")
    randomise(lk.attach(model, config(other), name="b"), "b", seed=9)
    alone = []
    for name in "ab":
        lk.activate(model, name)
        alone.append(model(x) - base)
    lk.activate(model, {"a": 0.7, "b": -1.5})
    torch.testing.assert_close(model(x), base + 0.7 * alone[0] - 1.5 * alone[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_its_state_dict_restores_it_and_detach_leaves_nothing_of_it(variant, layer):
    model, x = on(layer)
    keys = set(model.state_dict())
    randomise(lk.attach(model, config(variant)))
    state, y = copy.deepcopy(model.state_dict()), model(x)
    assert {key for key in state if not key.startswith("0.lora_default.")} == keys
    randomise(model, seed=70)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    lk.detach(model)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_dropout_is_drawn_in_training_alone(variant, layer):
    if layer == "embedding" or variant in NO_DROPOUT:
        pytest.skip("an embedding's dropout is of the rank's dimension, and these kinds have none")
    model, x = on(layer)
    randomise(lk.attach(model, config(variant, dropout=0.5)))
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("variant", LIVE)
def test_a_layer_that_it_is_not_for_is_refused_and_left_as_it_was(variant):
    every = set().union(*LIVE.values())
    for layer in sorted(every - LIVE[variant]):
        model, x = on(layer)
        before, cls = model(x), type(model[0])
        with pytest.raises(LorakitError, match="'0'"):
            lk.attach(model, config(variant))
        assert type(model[0]) is cls
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("variant, layer", PAIRS)
def test_one_of_another_size_is_refused_with_its_module(variant, layer):
    model, _ = on(layer)
    value = lk.capture(lk.attach(model, config(variant)))
    other = nn.Sequential(nn.Embedding(7, 3) if layer == "embedding" else nn.Linear(7, 3))
    with pytest.raises(AdapterError, match="'0'"):
        lk.attach(other, value, force=True)


def test_a_kind_that_no_model_takes_is_refused_with_what_to_do():
    model, _ = on("linear")
    for update, said in (
        (VALUES["whole"].update, "resize"),
        (Dora(VALUES["whole"].update, torch.rand(8, 1)), "DoRA over"),
    ):
        with pytest.raises(AdapterError, match=said):
            lk.attach(model, lk.Adapter(lk.LoraConfig(targets=["0"]), {"0": update}))
    with pytest.raises(lk.errors.ConfigError, match="did you mean 'lora'"):
        lk.LoraConfig(variant="lorra")
