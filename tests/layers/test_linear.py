"""Adapted linears: what they compute, in every way that torch may run them."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.layers.linear import LinearLayer
from lorakit.ops.dropout import draw_mask, draw_seed, masked, scaled


def adapted(layer: nn.Module, **config) -> nn.Module:
    """A model of one layer with a random adapter on it."""
    model = nn.Sequential(layer)
    lk.attach(model, lk.LoraConfig(**{"rank": 3, "alpha": 6, "targets": ["0"]} | config))
    return tiny.randomise_factors(model)


def linear(dtype: torch.dtype = torch.float32, **kwargs) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 5, **kwargs).to(dtype)


def plain(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The paper's line in float64."""
    layer = model[0]
    f = layer.lora_default
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    base = F.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
    return base + f.alpha / f.rank * x.double() @ f.A.double().T @ f.B.double().T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)], ids=str)
def test_the_output_is_the_papers_line(shape, bias):
    model, x = adapted(linear(bias=bias)), torch.randn(shape)
    torch.testing.assert_close(model(x).double(), plain(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)], ids=str)
def test_gradients_are_those_of_the_papers_line(shape):
    model, x = adapted(linear(torch.float64)), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, model[0].lora_default.A, model[0].lora_default.B]
    ours = torch.autograd.grad(model(x).square().sum(), wanted)
    for a, e in zip(ours, torch.autograd.grad(plain(model, x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, e)


def test_conv1d_of_transformers_is_a_linear_with_its_weight_transposed():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = adapted(Conv1D(5, 8)), torch.randn(2, 3, 8, requires_grad=True)
    torch.testing.assert_close(model(x).double(), plain(model, x), atol=1e-5, rtol=1e-5)
    wanted = [x, model[0].lora_default.A, model[0].lora_default.B]
    ours = torch.autograd.grad(model(x).square().sum(), wanted)
    for a, e in zip(ours, torch.autograd.grad(plain(model, x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, e, atol=1e-3, rtol=1e-4)
    before = model(x)
    lk.merge(model)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_dropout_drops_inputs_of_the_update_only_and_only_in_training():
    model, x = adapted(linear(), dropout=0.5), torch.randn(64, 8)
    model.eval()
    torch.testing.assert_close(model(x).double(), plain(model, x), atol=1e-5, rtol=1e-5)
    model.train()
    torch.manual_seed(3)
    ours = model(x)
    torch.manual_seed(3)
    f = model[0].lora_default
    kept = masked(x, draw_mask(x, 0.5, draw_seed()))
    theirs = F.linear(x, model[0].weight, model[0].bias) + 2 * (kept / 0.5) @ f.A.T @ f.B.T
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, model(x)), "another draw"


def test_dropout_gives_the_gradients_of_the_same_draw():
    model, x = (
        adapted(linear(torch.float64), dropout=0.4).train(),
        torch.randn(6, 8, dtype=torch.float64, requires_grad=True),
    )
    f = model[0].lora_default
    torch.manual_seed(3)
    ours = torch.autograd.grad(model(x).square().sum(), [x, f.A, f.B])
    torch.manual_seed(3)
    dropped = scaled(x, draw_mask(x, 0.4, draw_seed()))
    theirs = F.linear(x, model[0].weight, model[0].bias) + 2 * dropped @ f.A.T @ f.B.T
    for a, e in zip(ours, torch.autograd.grad(theirs.square().sum(), [x, f.A, f.B]), strict=True):
        torch.testing.assert_close(a, e)


def test_a_bf16_base_gets_fp32_masters_and_bf16_outputs():
    model, x = adapted(linear(torch.bfloat16)), torch.randn(4, 8, dtype=torch.bfloat16)
    y = model(x)
    y.float().sum().backward()
    f = model[0].lora_default
    assert (f.A.dtype, f.B.dtype, f.A.grad.dtype, y.dtype) == (
        torch.float32,
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    torch.testing.assert_close(y.double(), plain(model, x), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(dropout):
    model, x = adapted(linear(), dropout=dropout).eval(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].lora_default.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), plain(model, x), atol=0.1, rtol=0.05)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = adapted(linear(), dropout=0.3).train(), torch.randn(4, 8, requires_grad=True)
    wanted = [x, model[0].lora_default.A, model[0].lora_default.B]
    results = []
    for run in (
        model,
        lambda x: checkpoint(model, x, use_reentrant=False),
        lambda x: checkpoint(model, x, use_reentrant=True),
    ):
        torch.manual_seed(2)
        for p in wanted:
            p.grad = None
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in wanted])
    for again in results[1:]:
        for a, e in zip(again, results[0], strict=True):
            assert torch.equal(a, e)


def test_inference_mode_computes_the_same():
    model, x = adapted(linear()), torch.randn(4, 8)
    with torch.inference_mode():
        y = model(x)
    assert torch.equal(y, model(x))


def test_several_adapters_add_up_with_their_weights():
    model, x = adapted(linear()), torch.randn(4, 8)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"], rslora=True), name="b")
    tiny.randomise_factors(model, 5)
    lk.activate(model, {"default": 0.7, "b": -1.3})
    one, two = model[0].lora_default, model[0].lora_b
    expected = F.linear(x.double(), model[0].weight.double(), model[0].bias.double())
    expected = expected + 0.7 * (6 / 3) * x.double() @ one.A.double().T @ one.B.double().T
    expected = expected - 1.3 * (32 / 2**0.5) * x.double() @ two.A.double().T @ two.B.double().T
    torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=1e-5)


class Squashed(nn.Linear):
    """A linear of the user's own, whose base keeps its output for backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


class Cached(nn.Linear):
    """A linear that hands out a tensor it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().forward(x)
        return self.kept


def test_a_subclass_of_linear_keeps_its_own_forward_under_the_update():
    torch.manual_seed(0)
    model, x = adapted(Squashed(8, 5)), torch.randn(4, 8, requires_grad=True)
    f = model[0].lora_default
    y, expected = model(x), torch.tanh(F.linear(x, model[0].weight, model[0].bias)) + 2 * x @ f.A.T @ f.B.T
    torch.testing.assert_close(y, expected)
    for a, e in zip(*(torch.autograd.grad(o.square().sum(), [x, f.A]) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, e)
    assert isinstance(model[0], Squashed)


def test_an_output_that_the_base_keeps_is_not_written_into():
    model, x = adapted(Cached(8, 5)), torch.randn(4, 8)
    with torch.no_grad():
        first = model(x).clone()
        assert torch.equal(model(x), first)


def test_hooks_on_an_adapted_layer_still_run():
    model, x = adapted(linear()), torch.randn(4, 8)
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    assert seen == []
    y = model(x)
    assert torch.equal(seen[0], y)


def test_unfreezing_the_base_beside_the_adapter_gives_its_gradients_too():
    model, x = adapted(linear(torch.float64)), torch.randn(4, 8, dtype=torch.float64)
    model[0].weight.requires_grad_(), model[0].bias.requires_grad_()
    wanted = [model[0].weight, model[0].bias, model[0].lora_default.A]
    ours = torch.autograd.grad(model(x).square().sum(), wanted)
    for a, e in zip(ours, torch.autograd.grad(plain(model, x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, e)


def test_a_parametrized_linear_is_adapted_on_top_of_its_computed_weight():
    layer = nn.utils.parametrizations.weight_norm(linear())
    model, x = adapted(layer, targets="0"), torch.randn(4, 8)
    torch.testing.assert_close(model(x).double(), plain(model, x), atol=1e-5, rtol=1e-5)
    with pytest.raises(lk.LorakitError, match="computed"):
        lk.merge(model)
    lk.detach(model)
    assert "Lora" not in type(model[0]).__name__


def test_a_lazy_linear_is_refused_until_it_has_a_shape():
    with pytest.raises(lk.LorakitError, match="has no shape yet"):
        lk.attach(nn.Sequential(nn.LazyLinear(5)), lk.LoraConfig(targets=["0"]))


def test_functional_transforms_see_the_update():
    model, x = adapted(linear(torch.float64)), torch.randn(4, 8, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    out = torch.func.functional_call(model, parameters, (x,))
    assert torch.equal(out, model(x))
    rows = torch.func.vmap(lambda row: torch.func.functional_call(model, parameters, (row[None],))[0])(x)
    torch.testing.assert_close(rows, model(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_adapted_layer_computes_and_trains_the_same(backend):
    model, x = adapted(linear()), torch.randn(4, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    f, g = model[0].lora_default, twin[0].lora_default
    y, z = model(x), compiled(x)
    torch.testing.assert_close(y, z)
    for a, e in zip(
        torch.autograd.grad(z.sum(), [x, g.A, g.B]), torch.autograd.grad(y.sum(), [x, f.A, f.B]), strict=True
    ):
        torch.testing.assert_close(a, e)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)


KINDS = {
    "linear": (linear, {}),
    "float64 linear without a bias": (lambda: linear(torch.float64, bias=False), {}),
    "Conv1D": (conv1d, {}),
    "packed": (lambda: nn.Linear(8, 6), {"packed": {"0": (True, False, True)}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen input", "two adapters", "no_grad"])
def test_an_output_may_be_changed_in_place_as_nn_linear_allows(kind, shape, mode):
    torch.manual_seed(0)
    make, config = KINDS[kind]
    model = adapted(make(), dropout=0.3, **config).train(mode != "eval")
    if mode == "two adapters":
        lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]), name="b")
        tiny.randomise_factors(model, 5)
        lk.activate(model, {"default": 1.0, "b": 1.0})
    x = torch.randn(shape, dtype=model[0].weight.dtype, requires_grad=mode != "frozen input")
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    found = []
    for in_place in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode != "no_grad"):
            y = model(x)
            z = y.mul_(2).add_(1).relu_() if in_place else (y * 2 + 1).relu()
        found.append([z, *(torch.autograd.grad(z.square().sum(), wanted) if mode != "no_grad" else [])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_plain_linears_take_the_one_node_path_and_others_do_not():
    x = torch.randn(2, 8)
    assert "_Project" in type(adapted(linear(), dropout=0.5).train()(x).grad_fn).__name__
    assert "_Project" not in type(adapted(Squashed(8, 5), dropout=0.5).train()(x).grad_fn).__name__
    assert issubclass(type(adapted(linear())[0]), LinearLayer)


@pytest.mark.parametrize("rows, size", [(32, 8), (4, 32)], ids=["summed weight", "thin products"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_small_linear_under_checkpointing_is_the_same_without(rows, size, reentrant):
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(size, size)).train(), torch.randn(rows, size, requires_grad=True)
    wanted = [x, model[0].lora_default.A, model[0].lora_default.B]
    plainly = model(x)
    plainly.square().sum().backward()
    expected = [plainly, *(t.grad.clone() for t in wanted)]
    for t in wanted:
        t.grad = None
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for a, e in zip([y, *(t.grad for t in wanted)], expected, strict=True):
        assert torch.equal(a, e)


def test_autocast_with_a_base_that_gives_float32():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    model = adapted(Wide(8, 5), dropout=0.2).train()
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.sum().backward()
    assert model[0].lora_default.A.grad.dtype == torch.float32
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x).double(), plain(model, x), atol=0.1, rtol=0.1)
