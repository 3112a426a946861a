"""What every start of a LoRA keeps (`LoraConfig.init`): the base is never changed, the update is a LoRA in every
operation. A new start is a line of STARTS.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import quantized
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.config.lora import Init
from lorakit.errors import ConfigError, LorakitError
from lorakit.layers.init import start_of, starts

LAYERS = ("linear", "Conv1D", "packed", "conv1d", "conv2d", "conv3d", "grouped", "embedding")


def x_of(layer: str) -> Tensor:
    shapes = {"conv1d": (6, 5, 9), "conv2d": (6, 4, 6, 6), "grouped": (6, 4, 6, 6), "conv3d": (6, 2, 4, 4, 4)}
    if layer == "embedding":
        return torch.tensor([[1, 2, 3], [0, 11, 2], [5, 5, 5], [7, 8, 9], [4, 6, 10], [11, 0, 1]])
    shape = shapes.get(layer, (6, 5, 12))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@dataclass(frozen=True)
class Row:
    """`layers`: those that it is defined for; `given`: what `attach` needs; `zero`: whether ΔW is zero at first."""

    layers: tuple[str, ...]
    given: tuple[str, ...] = ()
    zero: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


WITH_CONV = LAYERS[:-1]
STARTS = {
    "pissa": Row(LAYERS),
    "milora": Row(LAYERS),
    "olora": Row(LAYERS),
    "eva": Row(WITH_CONV, ("batches", "loss")),
    "lora_ga": Row(WITH_CONV, ("batches", "loss")),
    "loftq": Row(("quantized",), ("originals",), zero=False),
}
PAIRS = [(init, layer) for init, row in STARTS.items() for layer in row.layers]
WEIGHT = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))


def on(layer: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model of one such layer, and six rows for it."""
    torch.manual_seed(0)
    module = {
        "linear": lambda: nn.Linear(12, 9),
        "Conv1D": lambda: Conv1D(9, 12),
        "packed": lambda: nn.Linear(12, 27),
        "conv1d": lambda: nn.Conv1d(5, 6, 3),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "conv3d": lambda: nn.Conv3d(2, 4, 2),
        "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1),
        "embedding": lambda: nn.Embedding(12, 8),
        "quantized": lambda: quantized.linear4(WEIGHT),
    }[layer]()
    x = torch.randn(6, 5, 64) if layer == "quantized" else x_of(layer)
    model = nn.Sequential(module)
    return (model, x) if layer == "quantized" else (model.to(dtype), x.to(dtype) if x.is_floating_point() else x)


def attach(model: nn.Module, init: str, layer: str, name: str = "default", **settings) -> nn.Module:
    given = {"batches": [on(layer)[1].to(next(model.parameters()).dtype)], "loss": squared, "originals": {"0": WEIGHT}}
    own = {"rank": 2, "alpha": 3.0, "targets": ["0"], "init": init} | STARTS[init].settings | settings
    if layer == "packed":
        own["packed"] = {"0": [True, False, True]}
    return lk.attach(model, lk.LoraConfig(**own), name, **{k: given[k] for k in STARTS[init].given})


def child(model: nn.Module, name: str = "default") -> Any:
    return getattr(model[0], f"lora_{name}")


def moved(model: nn.Module, name: str = "default", seed: int = 5) -> nn.Module:
    """Some steps away from the start."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in child(model, name).parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=made))
    return model


def test_every_start_has_its_line_here_and_is_one_of_the_config():
    assert set(STARTS) == set(starts()) == set(get_args(Init)) - {"default", "gaussian"}
    assert start_of("default") is None is start_of("gaussian")


@pytest.mark.parametrize("init, layer", PAIRS)
def test_it_starts_as_the_base_and_learns(init, layer):
    model, x = on(layer)
    if layer == "quantized":  # computed in another way from the first adapter on, so as not to be repacked
        lk.attach(model, lk.LoraConfig(rank=1, targets=["0"]), "first", activate=False)
    before = model(x)
    weight = {n: t.detach().clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    attach(model, init, layer)
    assert torch.equal(model(x), before) == STARTS[init].zero
    squared(model, x).backward()
    assert any(p.grad is not None and p.grad.any() for p in child(model).parameters())
    moved(model)
    assert not torch.allclose(model(x), before, atol=1e-3)
    lk.activate(model, None)
    assert torch.equal(model(x), before)
    lk.detach(model)
    assert all(torch.equal(t, weight[n]) for n, t in model.state_dict().items() if isinstance(t, Tensor))


@pytest.mark.parametrize("init, layer", [pair for pair in PAIRS if pair[1] != "quantized"])
def test_its_gradients_are_those_of_its_values(init, layer):
    model, x = on(layer, torch.float64)
    moved(attach(model, init, layer))
    assert torch.autograd.gradcheck(lambda *_: model(x), list(child(model).parameters()))


@pytest.mark.parametrize("init, layer", PAIRS)
def test_captured_and_attached_again_it_is_the_same(init, layer):
    model, x = on(layer)
    moved(attach(model, init, layer))
    value = lk.capture(model)
    assert value.config.init == "default"
    assert {(f.rank, f.alpha) for f in value.factors.values()} == {(value.config.rank, value.config.alpha)}
    other, _ = on(layer)
    again = lk.attach(other, value.check())
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    twice = lk.capture(again).updates["0"]
    assert all(torch.equal(t, twice.tensors()[name]) for name, t in value.updates["0"].tensors().items())


@pytest.mark.parametrize("layer", ["linear", "Conv1D", "conv2d", "embedding"])
@pytest.mark.parametrize("init", STARTS)
def test_a_dora_starts_from_it_with_the_weights_own_magnitude(init, layer):
    if layer not in STARTS[init].layers:
        pytest.skip(f"{init} is not for this layer")
    model, x = on(layer)
    before = model(x)
    attach(model, init, layer, variant="dora")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    W = model[0].weight.detach()
    rows = W.T if model[0].lora_transposed else W.flatten(1)
    torch.testing.assert_close(child(model).magnitude.detach().flatten(), rows.norm(dim=1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        child(model).inner.A.mul_(1.2)
        child(model).magnitude.mul_(1.1)
    update = child(model).inner
    A0, B0 = (update.A0, update.B0) if STARTS[init].zero and init != "eva" else (update.A, torch.zeros_like(update.B))
    change = update.scale * (update.B.flatten(1) @ update.A.flatten(1) - B0.flatten(1) @ A0.flatten(1))
    direction = rows + change
    expected = child(model).magnitude.flatten()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    changed, _ = on(layer)
    with torch.no_grad():
        changed[0].weight.copy_((expected.T if model[0].lora_transposed else expected).reshape(W.shape))
    torch.testing.assert_close(model(x), changed(x), rtol=1e-4, atol=1e-5)
    assert lk.capture(model).updates["0"].inner.rank == (2 if init == "eva" else 4)


@pytest.mark.parametrize("init, layer", [pair for pair in PAIRS if pair[1] != "quantized"])
def test_merged_it_computes_the_same_and_unmerged_the_weight_has_its_bits(init, layer):
    model, x = on(layer)
    before = model[0].weight.detach().clone()
    moved(attach(model, init, layer))
    y = model(x)
    for _ in range(3):
        lk.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        lk.unmerge(model)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("init, layer", PAIRS)
def test_rows_of_a_batch_have_it_each_for_itself_beside_another(init, layer, grad):
    model, x = on(layer)
    moved(attach(model, init, layer, "a"), "a")
    other = {"packed": {"0": [True, False, True]}} if layer == "packed" else {}
    lk.attach(model, lk.LoraConfig(rank=3, targets=["0"], **other), "b", trainable=True)
    moved(model, "b", seed=9)
    choices = ["b", None, {"a": 0.5, "b": -2.0}, "a", "a", None]
    expected = []
    for row, choice in zip(x, choices, strict=True):
        lk.activate(model, choice)
        expected.append(model(row[None]))
    with torch.set_grad_enabled(grad), lk.route(model, choices):
        torch.testing.assert_close(model(x), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init, layer", [pair for pair in PAIRS if pair[1] != "quantized"])
def test_its_state_dict_and_a_deep_copy_have_it_whole(init, layer):
    model, x = on(layer)
    moved(attach(model, init, layer))
    state, y, twin = copy.deepcopy(model.state_dict()), model(x), copy.deepcopy(model)
    moved(model, seed=70)
    assert not torch.equal(model(x), y)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    assert torch.equal(twin(x), y)


@pytest.mark.parametrize("init", STARTS)
def test_layers_that_it_is_not_for_are_refused_and_left_as_they_were(init):
    for layer in set(LAYERS) - set(STARTS[init].layers):
        model, x = on(layer)
        before, cls = model(x), type(model[0])
        with pytest.raises(LorakitError, match=r"'0'|none of the modules"):
            attach(model, init, layer)
        assert type(model[0]) is cls
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("init", STARTS)
def test_what_it_is_made_from_is_asked_for(init):
    layer = STARTS[init].layers[0]
    model, _ = on(layer)
    settings = lk.LoraConfig(rank=2, targets=["0"], init=init)
    if STARTS[init].given:
        with pytest.raises(ConfigError, match=f"init='{init}'"):
            lk.attach(model, settings)
    for name, value in (("batches", [1]), ("originals", {})):
        if name not in STARTS[init].given:
            with pytest.raises(ConfigError, match=rf"{name}=...\) is for"):
                lk.attach(model, settings, **{name: value})
