"""Packed projections: one linear whose equal parts are q, k, v, with some of them adapted."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError, StateError, TargetError

PARTS = [[True, False, True], [False, True, False], [True, True, True], [False, False, True]]


def packed(parts: list[bool], kind: str = "linear", dtype: torch.dtype = torch.float64, **config) -> nn.Sequential:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12) if kind == "linear" else Conv1D(12, 8)).to(dtype)
    lk.attach(model, lk.LoraConfig(**{"rank": 2, "alpha": 6, "targets": ["0"], "packed": {"0": parts}} | config))
    return tiny.randomise_factors(model)


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "".join("qkv"[i] for i, on in enumerate(p) if on))
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_each_adapted_part_has_an_update_of_its_own_and_the_rest_none(parts, kind):
    model, x = packed(parts, kind), torch.randn(2, 3, 8, dtype=torch.float64)
    layer, f = model[0], model[0].lora_default
    assert f.A.shape == (2 * sum(parts), 8)
    assert f.B.shape == (sum(parts), 4, 2)
    weight = layer.weight if kind == "linear" else layer.weight.T
    rows, used = list((x @ weight.T + layer.bias).chunk(3, dim=-1)), 0
    for i, on in enumerate(parts):
        if on:
            rows[i] = rows[i] + 6 / 2 * x @ f.A[2 * used : 2 * used + 2].T @ f.B[used].T
            used += 1
    expected = torch.cat(rows, dim=-1)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[0, 0]), expected[0, 0])


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_and_the_captured_update_agree_with_the_forward(parts, kind):
    model, x = packed(parts, kind, rslora=True), torch.randn(2, 3, 8, dtype=torch.float64)
    before, base = model(x), tiny.bits(model)
    value = lk.capture(model).factors["0"]
    assert value.rank == 2
    assert value.B.shape == (12, 2 * sum(parts))
    lk.merge(model)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model[0].weight, base["0.weight"] + value.delta())
    lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), base)


def test_gradients_flow_to_every_adapted_part_and_to_the_input():
    model, x = packed([True, False, True]), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    f = model[0].lora_default
    value = model[0].weight + 3 * torch.cat([f.B[0] @ f.A[:2], torch.zeros(4, 8), f.B[1] @ f.A[2:]])
    ours = torch.autograd.grad(model(x).square().sum(), [x, f.A, f.B])
    theirs = torch.autograd.grad((x @ value.T + model[0].bias).square().sum(), [x, f.A, f.B])
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


def test_a_captured_packed_adapter_comes_back_compact_and_equal(tiny_gpt2):
    config = lk.LoraConfig(rank=2, packed={"c_attn": [True, False, True]}, targets=["c_attn"])
    tiny.randomise_factors(lk.attach(tiny_gpt2, config))
    before, value = tiny.logits(tiny_gpt2), lk.capture(tiny_gpt2)
    twin = lk.attach(tiny.gpt2(), value)
    assert torch.equal(tiny.logits(twin), before)
    assert twin.transformer.h[0].attn.c_attn.lora_default.B.dim() == 3


def test_an_adapter_that_is_not_packed_covers_all_parts_beside_one_that_is():
    model, x = packed([True, False, False]), torch.randn(5, 8, dtype=torch.float64)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]), name="whole")
    f = tiny.randomise_factors(model)[0].lora_whole
    assert f.B.shape == (12, 2)
    torch.testing.assert_close(model(x), x @ model[0].weight.T + model[0].bias + f.scale * x @ f.A.T @ f.B.T)
    value = lk.capture(model, "whole")
    assert value.factors["0"].parts is None
    twin = nn.Sequential(nn.Linear(8, 12)).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(lk.attach(twin, value)(x), model(x))


def test_packed_values_go_beside_any_other_adapter():
    x = torch.randn(5, 8, dtype=torch.float64)
    source = packed([True, False, True])
    value, expected = lk.capture(source), source(x)
    for first in ({"packed": {"0": [False, True, False]}}, {}, {"packed": {"0": [True, False]}}):
        model = nn.Sequential(nn.Linear(8, 12)).double()
        model.load_state_dict(source.state_dict(), strict=False)
        lk.attach(model, lk.LoraConfig(rank=2, targets=["0"], **first), name="first")
        lk.attach(model, value, name="second")
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(lk.capture(model, "second").factors["0"].delta(), value.factors["0"].delta())


def test_another_packing_of_the_same_module_is_refused_and_changes_nothing():
    model = packed([True, False, True])
    before = tiny.picture(model)
    with pytest.raises(StateError, match="already has another adapter"):
        lk.attach(model, lk.LoraConfig(targets=["0"], packed={"0": [True, True]}), name="b")
    assert tiny.picture(model) == before


@pytest.mark.parametrize(
    "config, said",
    [
        ({"packed": {"nope": [True]}}, "no adapted module matches 'nope'"),
        (
            {"packed": {"0": [True, False, False, False, True]}},
            "12 outputs, which cannot be divided into 5 equal parts",
        ),
    ],
)
def test_a_packing_that_cannot_be_is_refused(config, said):
    with pytest.raises(TargetError, match=said):
        lk.attach(nn.Sequential(nn.Linear(8, 12)), lk.LoraConfig(targets=["0"], **config))


def test_only_a_linear_can_be_packed():
    model = nn.Sequential(nn.Embedding(8, 12))
    with pytest.raises(TargetError, match="only a linear can be packed"):
        lk.attach(model, lk.LoraConfig(targets=["0"], packed={"0": [True, False, True]}))
    f = lk.Factors(torch.randn(2, 8), torch.zeros(12, 2), 4.0, "embedding", parts=(True, False, False))
    with pytest.raises(LorakitError, match="only a linear can be packed"):
        lk.attach(model, lk.Adapter(lk.LoraConfig(rank=2, targets=["0"]), {"0": f}))


def test_dropout_and_bf16_work_on_packed_projections():
    model, x = (
        packed([True, False, True], dtype=torch.bfloat16, dropout=0.5).train(),
        torch.randn(64, 8, dtype=torch.bfloat16),
    )
    first, second = model(x), model(x)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first[:, :4], second[:, :4])
    assert torch.equal(first[:, 4:8], second[:, 4:8]), "the part that is not adapted is the base's"


def test_an_output_that_the_base_keeps_is_not_written_into():
    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(x)
            return self.kept

    model = nn.Sequential(Keeping(8, 12))
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"], packed={"0": [True, False, True]}))
    tiny.randomise_factors(model)
    x = torch.randn(3, 8)
    with torch.no_grad():
        out = model(x)
        assert not torch.equal(out, model[0].kept)
        assert torch.equal(model[0].kept, nn.functional.linear(x, model[0].weight, model[0].bias))
