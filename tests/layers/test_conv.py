"""Adapted convolutions of every dimension, with all that a convolution can have,
against the convolution with W + ΔW.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, StateError
from lorakit.layers.updates.lora import LoraFactors
from lorakit.ops import summed

CASES = {
    "1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "dilation": 2}),
    "1d grouped": (nn.Conv1d, (4, 6, 3), {"groups": 2}),
    "2d": (nn.Conv2d, (4, 6, (3, 2)), {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "bias": False}),
    "2d same": (nn.Conv2d, (4, 6, 3), {"padding": "same", "dilation": 2}),
    "2d reflect": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
    "2d circular same": (nn.Conv2d, (4, 6, (3, 2)), {"padding": "same", "padding_mode": "circular"}),
    "2d replicate grouped": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "groups": 2}),
    "2d depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4, "padding": 1}),
    "2d pointwise": (nn.Conv2d, (4, 6, 1), {}),
    "3d": (nn.Conv3d, (4, 6, (1, 1, 3)), {"padding": (0, 0, 1)}),
    "3d grouped": (nn.Conv3d, (4, 6, (1, 2, 3)), {"groups": 2, "stride": (1, 2, 1)}),
}
SHAPES = {nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 4, 7, 6), nn.Conv3d: (2, 4, 3, 4, 5)}


def adapted(case: str, dtype: torch.dtype = torch.float64, **config) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    kind, args, options = CASES[case]
    model = nn.Sequential(kind(*args, **options)).to(dtype).eval()
    lk.attach(model, lk.LoraConfig(**{"rank": 3, "alpha": 6, "targets": ["0"]} | config))
    return tiny.randomise_factors(model), torch.randn(SHAPES[kind], dtype=dtype)


def updated(model: nn.Sequential) -> Callable[[torch.Tensor], torch.Tensor]:
    """The plain convolution with W + ΔW as its weight, differentiable in A and B."""
    conv, f = model[0], model[0].lora_default
    bare = type(conv).__bases__[1](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        dtype=conv.weight.dtype,
    )
    delta = (f.B.flatten(1) @ f.A.flatten(1)).view(conv.weight.shape)
    parameters = dict(conv.named_parameters(recurse=False)) | {"weight": conv.weight + f.alpha / f.rank * delta}
    return lambda x: torch.func.functional_call(bare, parameters, (x,))


@pytest.fixture(params=["summed weight", "thin convolutions"])
def form(request, monkeypatch):
    """Compute with W + ΔW, or with A and B apart, whatever the sizes."""
    monkeypatch.setattr(summed, "LARGEST", 1e9 if request.param == "summed weight" else 0)
    monkeypatch.setattr(summed, "LARGEST_KEPT", 1e9)
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [3, 6])
def test_the_output_and_gradients_are_those_of_the_updated_weight(case, alpha, form):
    model, x = adapted(case, alpha=alpha)
    x.requires_grad_()
    wanted = [x, model[0].lora_default.A, model[0].lora_default.B]
    ours, theirs = model(x), updated(model)(x)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(
        torch.autograd.grad(ours.square().sum(), wanted),
        torch.autograd.grad(theirs.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("case", CASES)
def test_merged_and_unmerged_agree_and_the_bits_come_back(case):
    model, x = adapted(case, torch.float32)
    base, before = tiny.bits(model), model(x)
    lk.merge(model)
    torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    assert not tiny.same_bits(tiny.bits(model), base)
    lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), base)


@pytest.mark.parametrize("case", ["1d", "2d", "3d grouped"])
def test_a_fresh_adapter_changes_no_bit(case):
    model, x = adapted(case, torch.float32)
    lk.detach(model)
    before = model(x)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]))
    assert torch.equal(model(x), before)


def test_an_input_without_a_batch_axis_works():
    model, x = adapted("2d")
    torch.testing.assert_close(model(x[0]), model(x)[0])


def test_dropout_drops_inputs_of_the_update_only():
    model, x = adapted("2d", dropout=0.5)
    assert not torch.equal(model.train()(x), model(x))
    with torch.no_grad():
        model[0].lora_default.B.zero_()
    assert torch.equal(model(x), model.eval()(x))


def test_a_bf16_convolution_gives_bf16():
    model, x = adapted("2d", torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    y = model(x)
    y.float().sum().backward()
    assert model[0].lora_default.A.grad.dtype == torch.float32


# PEFT's grouped form: A over all inputs, B grouped. More general than a change of the weight.


def peft_grouped(A: torch.Tensor) -> lk.Adapter:
    B = torch.randn(6, A.shape[0] // 2, 1, 1, generator=torch.Generator().manual_seed(1))
    return lk.Adapter(lk.LoraConfig(rank=A.shape[0], targets=["0"]), {"0": lk.Factors(A, B, 8.0, "conv", groups=2)})


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_pefts_grouped_factors_compute_conv_then_grouped_conv_and_do_not_merge(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, padding_mode=mode)
    model, x = nn.Sequential(conv), torch.randn(2, 4, 7, 7)
    A = torch.randn(4, 4, 3, 3)
    adapter = peft_grouped(A)
    before = conv(x)
    lk.attach(model, adapter)
    down = nn.Conv2d(4, 4, 3, padding=1, stride=2, padding_mode=mode, bias=False)
    up = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    down.weight.data, up.weight.data = A, adapter.factors["0"].B
    torch.testing.assert_close(model(x), before + 8 / 4 * up(down(x)))
    with pytest.raises(StateError, match="'0' carries PEFT's grouped form"):
        lk.merge(model)
    with pytest.raises(AdapterError, match="reads across the 2 groups"):
        adapter.factors["0"].delta()
    again = lk.capture(model)
    assert torch.equal(again.factors["0"].A, A)


def test_factors_of_another_kernel_or_grouping_are_refused():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    good = torch.randn(4, 4, 3, 3)
    wrong = [
        lk.Factors(good[..., :2], torch.randn(6, 2, 1, 1), 8.0, "conv", groups=2),
        lk.Factors(good, torch.randn(6, 2, 3, 3), 8.0, "conv", groups=2),
        lk.Factors(good, torch.randn(6, 4, 1, 1), 8.0, "conv"),
        lk.Factors(good[:, :3], torch.randn(6, 4, 1, 1), 8.0, "conv"),
    ]
    for factors in wrong:
        model = nn.Sequential(conv)
        with pytest.raises(AdapterError, match="do not fit '0'"):
            lk.attach(model, lk.Adapter(lk.LoraConfig(rank=4, targets=["0"]), {"0": factors}))
        assert not any(isinstance(m, LoraFactors) for m in model.modules())
        assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_fresh_adapter_leaves_the_bases_bits_and_layout(layout, form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).to(memory_format=layout).requires_grad_(False)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    before = model(x)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]))
    after = model(x)
    assert torch.equal(after, before)
    assert after.is_contiguous(memory_format=layout)


def calls_of_the_base(model: nn.Module, run: Callable[[], object], monkeypatch) -> int:
    """How often a convolution with the base's own weight is computed."""
    weight, own, calls = model[0].weight, nn.Conv2d._conv_forward, []
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda conv, x, W, b: calls.append(W is weight) or own(conv, x, W, b)
    )
    run()
    return sum(calls)


def test_the_weight_is_summed_only_for_one_plain_update_without_dropout_or_autocast(monkeypatch):
    model, x = adapted("2d pointwise", torch.float32)
    assert calls_of_the_base(model, lambda: model(x), monkeypatch) == 0
    with torch.no_grad():
        assert calls_of_the_base(model, lambda: model(x), monkeypatch) == 1, "no gradients"
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of_the_base(model, lambda: model(x), monkeypatch) == 1, "autocast"
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]), name="second")
    lk.activate(model, {"default": 1.0, "second": 1.0})
    assert calls_of_the_base(model, lambda: model(x), monkeypatch) == 1, "two adapters"
    dropping, _ = adapted("2d pointwise", torch.float32, dropout=0.5)
    assert calls_of_the_base(dropping.train(), lambda: dropping(x), monkeypatch) == 1, "dropout"
    assert calls_of_the_base(dropping.eval(), lambda: dropping(x), monkeypatch) == 0
