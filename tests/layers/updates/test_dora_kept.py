"""What a DoRA keeps without gradients is never out of date."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_dora import built, config, randomise
from torch import nn

import lorakit as lk
from lorakit.layers.updates import dora
from lorakit.layers.updates.dora import DoraFactors


@pytest.fixture
def norms(monkeypatch) -> list[int]:
    """A list that grows by one with each computation of norms."""
    counted: list[int] = []
    original = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: (counted.append(1), original(*args))[1])
    return counted


def test_norms_are_computed_once_for_generating_and_in_each_step_of_training(norms):
    model, x = built("linear")
    randomise(lk.attach(model, config())).eval()
    norms.clear()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(norms) == 1
    model.train()
    for _ in range(2):
        model(x).sum().backward()
    assert len(norms) == 3
    with torch.inference_mode():
        model.eval()(x), model(x)
    assert len(norms) == 4
    frozen = lk.attach(built("linear")[0], lk.capture(model))
    norms.clear()
    for _ in range(3):
        frozen(x)
    assert len(norms) == 1


def _optimizer_step(model: nn.Module) -> None:
    model(torch.ones(1, 40)).sum().backward()
    torch.optim.AdamW(model[0].lora_default.parameters(), lr=0.1).step()


def _step_without_counting(model: nn.Module) -> None:
    """As some optimizers write, which torch does not count."""
    model(torch.ones(1, 40)).sum().backward()
    for p in model[0].lora_default.parameters():
        p.data.add_(p.grad, alpha=-0.1)


def _load(model: nn.Module) -> None:
    state = {name: t + 0.1 if "lora_" in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)


def _merge_another(model: nn.Module) -> None:
    lk.attach(model, config(variant="lora"), name="other")
    with torch.no_grad():
        model[0].lora_other.B.normal_()
    lk.merge(model)
    lk.unmerge(model)
    lk.activate(model, "default")


def _replace_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 1.5, requires_grad=False)


CHANGES = {
    "magnitude": lambda m: m[0].lora_default.magnitude.mul_(1.1),
    "A": lambda m: m[0].lora_default.inner.A.mul_(1.1),
    "B": lambda m: m[0].lora_default.inner.B.mul_(1.1),
    "weight": lambda m: m[0].weight.add_(0.1),
    "the weight's data replaced": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 1.2),
    "the weight replaced": _replace_weight,
    "B replaced": lambda m: setattr(m[0].lora_default.inner, "B", nn.Parameter(m[0].lora_default.inner.B * 2)),
    "an optimizer's step": _optimizer_step,
    "a step that is not counted": _step_without_counting,
    "loading": _load,
    "another adapter merged and unmerged": _merge_another,
    "precision": lambda m: m.double().float(),
    "B's values, through .data": lambda m: m[0].lora_default.inner.B.data.mul_(1.5),  # as averages of parameters do
    "the magnitude's values, through .data": lambda m: m[0].lora_default.magnitude.data.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_out_of_date(change):
    model, x = built("linear")
    randomise(lk.attach(model, config())).eval()
    with torch.no_grad():
        model(x)
    with torch.enable_grad() if "step" in change else torch.no_grad():
        CHANGES[change](model)
    fresh = lk.attach(nn.Sequential(nn.Linear(40, 30)), lk.capture(model, "default"), force=True).eval()
    with torch.no_grad():
        fresh[0].weight.copy_(model[0].weight), fresh[0].bias.copy_(model[0].bias)
        assert torch.equal(model(x), fresh(x))


def test_a_weight_computed_from_other_parameters_is_read_each_time():
    model, x = built("linear without bias")
    nn.utils.parametrizations.weight_norm(model[0])
    randomise(lk.attach(model, config(targets="0"))).eval()
    with torch.no_grad():
        model(x)
        model[0].parametrizations.weight.original0.mul_(torch.rand(220, 1) + 1)
        found, W = model(x), model[0].weight
        update: DoraFactors = model[0].lora_default
        V = W + 2.0 * update.inner.B @ update.inner.A
        torch.testing.assert_close(found, x @ (update.magnitude * V / V.norm(dim=1, keepdim=True)).T)


def test_copies_compute_with_their_own_weights():
    model, x = built("linear")
    randomise(lk.attach(model, config())).eval()
    with torch.no_grad():
        y = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)
            other[0].weight.mul_(2)
            other[0].lora_default.magnitude.mul_(2)
            assert not torch.equal(other(x), y)
            assert torch.equal(model(x), y)


def test_on_an_offloaded_base_a_loaded_one_computes_the_same():
    from accelerate import cpu_offload

    model, x = built("linear")
    model.eval()
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    value = lk.capture(randomise(lk.attach(model, config())))
    lk.attach(offloaded, value)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(offloaded(x), model(x))
