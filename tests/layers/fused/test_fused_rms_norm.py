"""Which norms are taken for an RMSNorm, and that every other norm computes what its own class does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fused_models import counts, kinds
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused
from lorakit.ops.fused.rms_norm import NormVariant


class Norm(nn.Module):
    """As Llama's."""

    def __init__(self, width: int = 16, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * self.normed(wide).to(x.dtype)

    def normed(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(16, 16), make(), nn.Linear(16, 16)
        with torch.no_grad():
            for p in self.norm.parameters():
                p.add_(0.3 * torch.randn(p.shape))
        self.to(dtype)
        lk.attach(self, lk.LoraConfig(rank=2, targets=["first", "last"]))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)).to(x.dtype)))


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = net(x)
    of = [p for p in net.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), of)]


def compare(net: nn.Module, sizes: tuple[float, ...] = (1e-3, 1.0, 50.0)) -> None:
    """The values to the bit, the gradients nearly, in training and evaluation."""
    twin = copy.deepcopy(net)
    fused.release(twin)
    assert kinds(twin) == {}
    dtype = net.first.weight.dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.05}
    for size in sizes:
        x = (size * torch.randn(6, 16, generator=torch.Generator().manual_seed(2))).to(dtype)
        for training in (True, False):
            found, expected = results(net.train(training), x), results(twin.train(training), x)
            assert torch.equal(found[0], expected[0])
            for a, e in zip(found[1:], expected[1:], strict=True):
                scale = e.float().abs().max().clamp_min(1e-12)
                torch.testing.assert_close(a.float() / scale, e.float() / scale, **tolerance)


class RoundedLast(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * self.normed(x.float())).to(x.dtype)


class FromOne(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return ((1.0 + self.weight.float()) * self.normed(x.float())).to(x.dtype)


KNOWN = {NormVariant.ROUNDED_FIRST: Norm, NormVariant.ROUNDED_LAST: RoundedLast, NormVariant.FROM_ONE: FromOne}


@pytest.mark.parametrize("form", KNOWN, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_form_is_told_from_the_others_and_computed_with_its_bits(form, dtype, calls):
    net = Net(KNOWN[form], dtype)
    assert net.norm.lora_norm_variant == (form, "eps")
    assert counts(calls, lambda: net(torch.randn(3, 16).to(dtype)))["rms_norm"] == 1
    compare(net)


class Centred(Norm):
    def normed(self, wide: Tensor) -> Tensor:
        wide = wide - wide.mean(-1, keepdim=True)
        return super().normed(wide)


class EpsilonOutside(Norm):
    def normed(self, wide: Tensor) -> Tensor:
        return wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class EpsilonClamped(Norm):
    def normed(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).clamp_min(self.eps))


class NotUpcast(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x)


class WeightInFloat32(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * self.normed(x.float()).to(x.dtype)


class Summed(Norm):
    def normed(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + self.eps)


class OverTheTokens(Norm):
    def normed(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean() + self.eps)


class WithBias(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class WithBuffer(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


class WithScale(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Noisy(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Noting(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return super().forward(x)


class Detached(Norm):
    """The same values, without the gradient through the mean."""

    def normed(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.detach().pow(2).mean(-1, keepdim=True) + self.eps)


class Fading(Norm):
    """Other values above a size."""

    def normed(self, wide: Tensor) -> Tensor:
        return super().normed(wide.clamp(-100, 100))


OTHERS = [
    Centred,
    EpsilonOutside,
    EpsilonClamped,
    NotUpcast,
    WeightInFloat32,
    Summed,
    OverTheTokens,
    WithBias,
    WithBuffer,
    WithScale,
    Noisy,
    Noting,
    Detached,
    Fading,
]


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_computes_something_else_keeps_its_forward(cls, dtype):
    net = Net(cls, dtype)
    assert kinds(net) == {}
    compare(net)


@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(16), lambda: nn.LayerNorm(16, bias=False), lambda: nn.GroupNorm(4, 16)]
)
def test_layer_and_group_norms_are_not_reported_as_norms_that_failed(make):
    net = Net(make)
    assert kinds(net) == {}
    assert [row.kind for row in fused.report(net)] == [fused.LINEAR]
    compare(net)


@pytest.mark.parametrize(
    "make", [lambda: nn.RMSNorm(16), lambda: nn.RMSNorm(16, eps=1e-5)], ids=["no epsilon", "epsilon"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_norm_has_its_bits(make, dtype):
    compare(Net(make, dtype))


def test_the_reason_is_reported():
    class OtherRMSNorm(Centred):
        pass

    rows = {row.cls: row for row in fused.report(Net(OtherRMSNorm))}
    assert rows["OtherRMSNorm"].kind == "RMSNorm"
    assert "values differ" in rows["OtherRMSNorm"].why_not


def test_epsilon_is_read_when_it_is_used():
    net = Net(Norm)
    net.norm.eps = 0.5
    compare(net)


def test_a_trained_weight_gets_its_gradient():
    net = Net(Norm)
    net.norm.weight.requires_grad_()
    assert kinds(net)
    net(torch.randn(3, 16)).sum().backward()
    assert net.norm.weight.grad.any()
    compare(net)


@pytest.mark.parametrize("name", ["x", "hidden_states"])
def test_the_input_may_be_given_by_its_name(name):
    class Named(Norm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states)

    net = Net(Norm if name == "x" else Named)
    assert kinds(net)
    x = torch.randn(3, 16, requires_grad=True)
    torch.testing.assert_close(net.norm(**{name: x}), net.norm(x))


def test_a_second_norm_with_something_of_its_own_is_not_taken_for_the_first():
    class Optional(Norm):
        after: Callable[[Tensor], Tensor] | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.after is None else self.after(y)

    def make() -> nn.Module:
        made = nn.Sequential(Optional(), Optional())
        made[1].after = torch.sin
        return made

    compare(Net(make))


def test_a_class_that_is_patched_after_attach_is_followed(monkeypatch):
    net = Net(Norm)
    monkeypatch.setattr(Norm, "forward", lambda self, x: x * 2)
    compare(net)


def test_attach_leaves_the_generator_and_the_module_as_they_were():
    torch.manual_seed(0)
    net = Net(Norm)
    fused.release(net)
    before = {k: (id(v), repr(v)) for k, v in net.norm.__dict__.items()}
    state, weight = torch.get_rng_state(), net.norm.weight.detach().clone()
    fused.adopt(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: (id(v), repr(v)) for k, v in net.norm.__dict__.items() if k != "lora_norm_variant"} == before
    assert torch.equal(net.norm.weight, weight)
