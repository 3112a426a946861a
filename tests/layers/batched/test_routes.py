"""A layer whose rows have adapters of their own: each row as if its adapter alone were active,
in values and gradients.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import lorakit as lk
from lorakit.errors import StateError

CHOICES = ["a", None, {"a": 0.5, "b": -2.0}, "c", "b", "a"]


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)


class Keeping(nn.Linear):
    """Keeps what it returned, so that nothing may be written into it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        return self.kept


# name: (the layer, its input for six rows, what else its config has)
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (6, 3, 8), {}),
    "linear, no bias": (lambda: nn.Linear(8, 6, bias=False), (6, 8), {}),
    "linear, four axes": (lambda: nn.Linear(8, 6), (6, 2, 3, 8), {}),
    "linear, long rows": (lambda: nn.Linear(8, 6), (6, 70, 8), {}),
    "linear with a forward of its own": (lambda: Keeping(8, 6), (6, 3, 8), {}),
    "Conv1D": (conv1d, (6, 3, 8), {}),
    "packed": (lambda: nn.Linear(8, 6), (6, 3, 8), {"packed": {"0": [True, False, True]}}),
    "packed Conv1D": (conv1d, (6, 3, 8), {"packed": {"0": [True, True, False]}}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (6, 4, 5), {}),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (6, 4, 5, 5), {}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (6, 2, 3, 3, 3), {}),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=2), None, {}),
}


def build(kind: str, trainable: bool = True, dropout: float = 0.0) -> tuple[nn.Module, torch.Tensor]:
    """A model of one layer with adapters a, b, c of unequal ranks, and an input."""
    make, shape, config = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double().eval()
    for rank, name in enumerate("abc", start=1):
        lk.attach(
            model,
            lk.LoraConfig(rank=rank, alpha=3, targets=["0"], dropout=dropout, **config),
            name=name,
            trainable=trainable,
        )
    tiny.randomise_factors(model)
    made = torch.Generator().manual_seed(3)
    if shape is None:
        return model, torch.randint(0, 9, (6, 4), generator=made)
    return model, torch.randn(shape, generator=made, dtype=torch.float64)


def row_by_row(model: nn.Module, x: torch.Tensor, choices: list = CHOICES) -> torch.Tensor:
    """Each row of the batch by itself, with its own adapter active."""
    rows = []
    for n, choice in enumerate(choices):
        lk.activate(model, choice)
        rows.append(model(x[n : n + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_is_what_its_adapter_alone_gives(kind):
    model, x = build(kind)
    expected = row_by_row(model, x)
    assert len({e.sum().item() for e in expected}) > 4  # the adapters do differ
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), lk.route(model, CHOICES):
            torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_rows_one_by_one(kind):
    model, x = build(kind)
    wanted = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        wanted.append(x.requires_grad_())
    g = torch.randn_like(row_by_row(model, x))
    expected = torch.autograd.grad(row_by_row(model, x), wanted, g)
    with lk.route(model, CHOICES):
        ours = torch.autograd.grad(model(x), wanted, g)
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_only_the_factors_that_a_choice_names(kind):
    model, x = build(kind)
    with lk.route(model, ["a", None, "c", "a", {"c": 2.0}, None]):
        model(x).sum().backward()
    assert all((p.grad is None) == ("lora_b" in n) for n, p in model.named_parameters() if ".lora_" in n)
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_a_layer_without_the_named_adapter_computes_the_base():
    model = tiny.mlp()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="a")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin1"]), name="b")
    tiny.randomise_factors(model)
    x = torch.randn(2, 10)
    expected = row_by_row(model, x, ["a", "b"])
    with lk.route(model, ["a", "b"]):
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x.requires_grad_()), expected)


def test_a_trainable_base_gets_its_gradients_too():
    model, x = build("linear")
    model[0].weight.requires_grad_(True)
    expected = torch.autograd.grad(row_by_row(model, x).square().sum(), model[0].weight)
    with lk.route(model, CHOICES):
        torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), model[0].weight), expected)


def test_frozen_factors_under_gradients_pass_them_on_to_the_input():
    model, x = build("linear", trainable=False)
    x.requires_grad_()
    expected = torch.autograd.grad(row_by_row(model, x).square().sum(), x)
    with lk.route(model, CHOICES):
        torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x), expected)


def test_inputs_that_are_not_contiguous():
    model, x = build("linear")
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), lk.route(model, CHOICES):
            torch.testing.assert_close(model(turned), model(x))


def test_a_batch_of_no_rows():
    model, x = build("linear")
    with lk.route(model, []):
        assert model(x[:0]).shape == (0, 3, 6)


def test_autocast_computes_in_its_precision():
    model, x = build("linear")
    model, x = model.float(), x.float()
    expected = row_by_row(model, x)
    with torch.autocast("cpu", torch.bfloat16), lk.route(model, CHOICES):
        ours = model(x)
        with torch.no_grad():
            assert model(x).dtype == torch.bfloat16
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, atol=0.1, rtol=0.05)
    ours.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("kind", ["linear", "packed", "conv1d", "embedding"])
def test_dropout_is_for_training(kind):
    model, x = build(kind, dropout=0.5)
    expected = row_by_row(model, x)
    with lk.route(model, CHOICES):
        torch.testing.assert_close(model(x), expected)
        model.train()
        for mode in (torch.enable_grad, torch.no_grad):  # the first run of reentrant checkpointing is without gradients
            with mode():
                assert not torch.equal(model(x)[0], expected[0])
                assert torch.allclose(model(x)[1], expected[1])
        model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("order, shared", [("ab", 3), ("aab", 3), ("aba", 4)])
def test_what_layers_derive_from_a_batch_is_shared_by_layers_of_equal_ranks(order, shared):
    model = tiny.llama()
    for rank, name in ((2, "a"), (3, "b")):
        lk.attach(model, lk.LoraConfig(rank=rank), name=name, trainable=False)
    ids = tiny.example(model)["input_ids"][:1].expand(len(order), -1)
    with torch.no_grad(), lk.route(model, list(order)):
        model(ids)
        # of 14 layers: in + out is 32, 24 (k and v) or 40; and, where rows must be gathered, the adapters' order
        assert len(model._lorakit.routing._shared) == shared


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside(reentrant):
    model, x = build("linear")
    wanted = [p for n, p in model.named_parameters() if ".lora_" in n]
    with lk.route(model, CHOICES):
        expected = torch.autograd.grad(model(x).square().sum(), wanted)
        checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    for p, e in zip(wanted, expected, strict=True):
        torch.testing.assert_close(p.grad, e)


@pytest.mark.parametrize("choices", [CHOICES, ["b"] * 6, ["a"] * 3 + ["b"] * 3, [None] * 5 + ["b"]], ids=str)
def test_a_backward_with_checkpointing_outside_is_an_error_and_not_another_gradient(choices):
    model, x = build("linear")
    lk.activate(model, "a")
    with lk.route(model, choices):
        loss = checkpoint(model, x.requires_grad_(), use_reentrant=False).square().sum()
    with pytest.raises(CheckpointError):
        loss.backward()


# For each group of as many rows one adapter: what trains them as one node.
GROUPS = [["a", "b", "c"], ["c", "c", "a", "a", "b", "b"], [{"b": -0.5}, {"c": 2.0}], ["b", "b"]]


def grads(model: nn.Module, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    of = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(out.square().sum(), of, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]


@pytest.mark.parametrize("choices", GROUPS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear, no bias", "Conv1D", "linear with a forward of its own"])
def test_groups_of_rows_have_the_values_and_gradients_of_the_rows_one_by_one(kind, choices):
    model, x = build(kind)
    x = x[: len(choices)].requires_grad_()
    expected = row_by_row(model, x, choices)
    with lk.route(model, choices):
        ours = model(x)
    torch.testing.assert_close(ours, expected)
    for a, e in zip(grads(model, ours, x), grads(model, expected, x), strict=True):
        torch.testing.assert_close(a, e)


def node(model: nn.Module, x: torch.Tensor, choices: list) -> str:
    with lk.route(model, choices):
        return model(x[: len(choices)].requires_grad_()).grad_fn.name()


def test_what_is_computed_as_groups_and_what_is_not():
    model, x = build("linear")
    for choices in GROUPS:
        assert "Project" in node(model, x, choices)
    for choices in (["a", "b", "a"], ["a", "a", "b"], ["a", None], [{"a": 0.5, "b": 0.5}, "b"]):
        assert "AddSegments" in node(model, x, choices)


def test_ranks_that_differ_too_much_are_not_filled_with_zeros():
    model, x = build("linear")
    lk.attach(model, lk.LoraConfig(rank=7, targets=["0"]), name="d", trainable=True)
    assert "Project" in node(model, x, ["c", "d"])
    assert "AddSegments" in node(model, x, ["a", "b", "d"])  # 21 for 10 in use


def test_a_group_whose_adapter_is_not_on_this_layer_gets_the_base_there():
    model = tiny.mlp().double()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="a")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0", "lin1"]), name="b", trainable=True)
    tiny.randomise_factors(model)
    x = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    expected = row_by_row(model, x, ["b", "a"])
    with lk.route(model, ["b", "a"]):
        ours = model(x)
    torch.testing.assert_close(ours, expected)
    for a, e in zip(grads(model, ours, x), grads(model, expected, x), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reentrant", [True, False])
def test_groups_draw_the_same_dropout_when_checkpointing_runs_them_again(reentrant):
    model, x = build("linear", dropout=0.4)
    model.train()
    x = x[:3].requires_grad_()
    with lk.route(model, ["a", "b", "c"]):
        torch.manual_seed(4)
        expected = grads(model, model(x), x)[1:]
        torch.manual_seed(4)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for p, e in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_groups_of_unequal_dropout_each_have_their_own():
    model, x = build("linear")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"], dropout=0.5), name="d", trainable=True)
    tiny.randomise_factors(model)
    expected = row_by_row(model, x[:2], ["a", "d"])
    model.train()
    with lk.route(model, ["a", "d"]):
        ours = model(x[:2])
    torch.testing.assert_close(ours[0], expected[0])
    assert not torch.allclose(ours[1], expected[1])


def test_torch_compile_gives_the_same_values():
    model, x = build("linear")
    expected = row_by_row(model, x)
    compiled = torch.compile(model, backend="eager")
    for choices, rows in ((CHOICES, expected), (CHOICES[::-1], None)):
        rows = row_by_row(model, x, choices) if rows is None else rows
        with torch.no_grad(), lk.route(model, choices):
            torch.testing.assert_close(compiled(x), rows)


# One choice per token


def packed(kind: str, tokens: int, requires_grad: bool = False, dropout: float = 0.0) -> tuple[nn.Module, torch.Tensor]:
    model, x = build(kind, trainable=requires_grad, dropout=dropout)
    made = torch.Generator().manual_seed(4)
    if not x.is_floating_point():
        return model, torch.randint(0, 9, (1, tokens), generator=made)
    return model, torch.randn(1, tokens, 8, generator=made, dtype=x.dtype)


TOKENS = {
    "mixed": ["a", None, {"a": 0.5, "b": -2.0}, "c", "b", "a", "a"],
    "groups": ["b"] * 4 + ["a"] * 4 + ["c"] * 4,
    "long runs": ["a"] * 70 + [None] * 70 + ["c"] * 60 + [{"b": 2.0}] * 80,
    "long and short": ["a"] * 150 + ["b", None, "c"],
}
BY_TOKEN = [kind for kind in LAYERS if "conv" not in kind]


@pytest.mark.parametrize("choices", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("kind", BY_TOKEN)
def test_each_token_is_what_its_adapter_alone_gives_it(kind, choices):
    model, x = packed(kind, len(choices))
    expected = row_by_row(model, x.transpose(0, 1), choices).transpose(0, 1)  # a row for each token
    assert expected.shape[:2] == (1, len(choices))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), lk.route(model, choices, per="token"):
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x[0]), expected[0])  # an engine without an axis of rows


@pytest.mark.parametrize("choices", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("kind", BY_TOKEN)
def test_gradients_of_tokens_are_those_of_the_tokens_one_by_one(kind, choices):
    model, x = packed(kind, len(choices), requires_grad=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        wanted.append(x.requires_grad_())
    out = row_by_row(model, x.transpose(0, 1), choices).transpose(0, 1)
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, wanted, g)
    with lk.route(model, choices, per="token"):
        ours = torch.autograd.grad(model(x), wanted, g)
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_groups_of_tokens_train_as_one_node():
    model, x = packed("linear", 12, requires_grad=True)
    with lk.route(model, TOKENS["groups"], per="token"):
        assert "Project" in model(x.requires_grad_()).grad_fn.name()


def test_dropout_of_tokens_is_for_training():
    model, x = packed("linear", 4, requires_grad=True, dropout=0.5)
    choices = ["a", None, {"a": 1.0, "b": 1.0}, "c"]
    expected = row_by_row(model, x.transpose(0, 1), choices).transpose(0, 1)
    model.train()
    with lk.route(model, choices, per="token"):
        ours = model(x)
    assert torch.allclose(ours[0, 1], expected[0, 1])
    assert not torch.allclose(ours[0, 0], expected[0, 0])


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            (1, 3, 8),
            r"'0' was given 3 tokens inside lorakit.route\(per='token'\); expected 4, one per choice\n"
            r"  every adapted module",
        ),
        ((1, 6, 8), r"'0' was given 6 tokens .*; expected 4, one per choice\n  each of the 6 tokens"),
        ((3, 8), r"'0' was given 3 tokens .*; expected 4"),
        ((2, 2, 8), r"'0' was given 2 x 2 tokens .*; expected one row of 4\n  concatenate the rows to "),
        ((4, 2, 8), r"'0' was given 8 tokens .*; expected 4"),
        ((8,), r"'0' was given 1 tokens .*; expected 4"),
    ],
)
def test_another_number_of_tokens_is_an_error(shape, message):
    model, _ = packed("linear", 4)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(StateError, match=message), lk.route(model, ["a", "b", None, "a"], per="token"):
            model(torch.randn(shape, dtype=torch.float64))


def test_an_embedding_counts_its_tokens():
    model, _ = packed("embedding", 4)
    with (
        pytest.raises(StateError, match=r"'0' was given 3 tokens .* expected 4"),
        lk.route(model, ["a", "b", None, "a"], per="token"),
    ):
        model(torch.zeros(1, 3, dtype=torch.long))
    with (
        pytest.raises(StateError, match=r"2 x 2 tokens .* expected one row of 4"),
        lk.route(model, ["a", "b", None, "a"], per="token"),
    ):
        model(torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d, groups"])
def test_a_convolution_mixes_tokens_and_is_refused(kind):
    model, x = build(kind)
    with (
        pytest.raises(StateError, match="'0' is a convolution, which mixes neighbouring tokens"),
        lk.route(model, CHOICES, per="token"),
    ):
        model(x)
