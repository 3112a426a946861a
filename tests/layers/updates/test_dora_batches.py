"""Batches that mix DoRA adapters, LoRA adapters and the base: each row as if it were alone."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.batched.stacks import Stack

NAMES = ("a", "b", "c", "d")  # two DoRA and two LoRA, of different ranks


def attach(model: nn.Module, targets: list[str] | str, trainable: bool = True, **settings) -> nn.Module:
    for i, name in enumerate(NAMES):
        own = {"variant": "dora" if name in "ab" else "lora", "rank": 3 + i % 2 if not settings else 4, "alpha": 8.0}
        lk.attach(model, lk.LoraConfig(**own | settings, targets=targets), name=name, trainable=trainable)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                p.copy_(p * (1 + 0.3 * noise) if key.endswith("magnitude") else 0.3 * noise)
    return model


def linear(dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(12, 10)).to(dtype), ["0"], **settings)


def alone(model: nn.Module, x: Tensor, choices: list) -> Tensor:
    rows = []
    for row, choice in zip(x, choices, strict=True):
        lk.activate(model, choice)
        rows.append(model(row[None]))
    return torch.cat(rows)


MIXED = ["a", None, {"a": 0.7, "b": -0.4, "c": 1.5}, "c", "b", {"d": 2.0}, "a"]
GROUPS = ["a", "a", "b", "b", "c", "c"]  # equally many rows each


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 80])
@pytest.mark.parametrize("choices", [MIXED, GROUPS, ["a"] * 3, [None, "b"]])
def test_each_row_is_computed_as_if_it_were_alone(choices, tokens, grad):
    model = linear()
    x = torch.randn(len(choices), tokens, 12, dtype=torch.float64)
    expected = alone(model, x, choices)
    model.train(grad)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # the second time from what the first has kept
            with lk.route(model, choices):
                found = model(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    base = [n for n, choice in enumerate(choices) if choice is None]
    lk.activate(model, None)
    assert torch.equal(found[base], model(x)[base])


@pytest.mark.parametrize("choices", [MIXED, GROUPS])
def test_gradients_are_the_sums_of_those_of_single_rows(choices):
    model = linear()
    x = torch.randn(len(choices), 5, 12, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.randn(len(choices), 5, 10, dtype=torch.float64)
    expected = torch.autograd.grad(alone(model, x, choices), [x, *parameters], gradient, allow_unused=True)
    with lk.route(model, choices):
        found = torch.autograd.grad(model(x), [x, *parameters], gradient, allow_unused=True)
    for own, other in zip(found, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grad", [False, True])
def test_tokens_of_a_packed_batch_each_have_their_own(grad):
    model, choices = linear(), [choice for choice in MIXED for _ in range(3)]
    x = torch.randn(1, len(choices), 12, dtype=torch.float64, requires_grad=grad)
    expected = alone(model, x[0], choices)
    with torch.set_grad_enabled(grad), lk.route(model, choices, per="token"):
        found = model(x)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    if grad:
        parameters = [p for p in model.parameters() if p.requires_grad]
        with lk.route(model, choices, per="token"):
            own = torch.autograd.grad(model(x).square().sum(), parameters)
        other = torch.autograd.grad(expected.square().sum(), parameters)
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_in_float32_and_bfloat16_rows_differ_by_rounding_only():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        model = linear(dtype).eval()
        x = torch.randn(len(MIXED), 4, 12).to(dtype)
        with torch.no_grad(), lk.route(model, MIXED):
            found = model(x)
        torch.testing.assert_close(found, alone(model, x, MIXED), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_stack_is_written_again_only_after_a_change(trainable, monkeypatch):
    model = linear(trainable=trainable).eval()
    x = torch.randn(len(MIXED), 1, 12, dtype=torch.float64)
    written: list[str] = []
    write = Stack.write
    monkeypatch.setattr(Stack, "write", lambda self, child, layer: (written.append(child), write(self, child, layer)))

    def check(expected: list[str] | None) -> None:
        written.clear()
        with torch.no_grad(), lk.route(model, MIXED):
            found = model(x)
        torch.testing.assert_close(found, alone(model, x, MIXED), rtol=1e-12, atol=1e-12)
        assert expected is None or sorted(written) == expected

    check(["lora_a", "lora_b", "lora_c", "lora_d"])
    check([] if not trainable else None)
    with torch.no_grad():
        model[0].lora_a.magnitude.mul_(1.5)
    check(["lora_a"] if not trainable else None)
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # both DoRA depend on it
    check(["lora_a", "lora_b"] if not trainable else None)


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_generates_and_trains_with_all_of_them(grad):
    model = attach(tiny.llama(), ["q_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"])
    ids = torch.randint(3, tiny.VOCAB, (len(MIXED), 6), generator=torch.Generator().manual_seed(0))

    def logits(choice, ids: Tensor) -> Tensor:
        lk.activate(model, choice)
        return model(ids).logits

    expected = torch.cat([logits(choice, row[None]) for choice, row in zip(MIXED, ids, strict=True)])
    model.train(grad)
    with torch.set_grad_enabled(grad), lk.route(model, MIXED):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_share_a_convolution_or_a_packed_projection_have_each_their_own():
    torch.manual_seed(0)
    conv = attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=True)).double(), ["0"])
    images = torch.randn(len(MIXED), 4, 5, 5, dtype=torch.float64)
    with lk.route(conv, MIXED):
        found = conv(images)
    torch.testing.assert_close(found, alone(conv, images, MIXED), rtol=1e-12, atol=1e-12)
    packed = tiny.gpt2().double()
    attach(packed, ["c_attn"], packed={"c_attn": [True, False, True]})
    ids = torch.randint(3, tiny.VOCAB, (len(MIXED), 5))
    expected = []
    for choice, row in zip(MIXED, ids, strict=True):
        lk.activate(packed, choice)
        expected.append(packed(row[None]).logits)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), lk.route(packed, MIXED):
            torch.testing.assert_close(packed(ids).logits, torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_rows_of_adapters_with_biases_of_their_own():
    """(g - 1)(base(x) - b) must take the bias that the row's own output has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    attach(model, ["0"], bias="lora_only")
    for n, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("bias"):
            with torch.no_grad():
                parameter.add_(n)
    choices = ["a", None, "b", "c"]
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    expected = alone(model, x, choices)
    assert not torch.allclose(expected[0] - expected[2], alone(copy.deepcopy(model), x, [None] * 4)[0], atol=0.1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), lk.route(model, choices):
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
