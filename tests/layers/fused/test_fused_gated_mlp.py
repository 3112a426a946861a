"""Which modules are taken for a gated MLP, and that every other one computes what its own class does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fused_models import counts
from mlp_nets import Mlp, Named, Packed, compare, is_fused, net
from torch import Tensor, nn

from lorakit.errors import TargetError
from lorakit.layers.fused import fused

ACTS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_gated_mlp_of_a_known_activation_is_fused(act, bias, dropout, calls):
    model = net(lambda: Mlp(ACTS[act], bias), dropout=dropout)
    assert is_fused(model) == [True, True]
    assert counts(calls, lambda: model(torch.randn(3, 8, dtype=torch.float64)))["gated_mlp"] == 2
    compare(model)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gate_and_up_may_be_one_linear(dropout, calls):
    model = net(Packed, dropout=dropout)
    assert is_fused(model) == [True, True]
    assert counts(calls, lambda: model(torch.randn(3, 8, dtype=torch.float64)))["gated_mlp"] == 2
    compare(model)


class Exchanged(Mlp):
    """The activation is on the one that is called up."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) * self.gate(x))


class Square(Mlp):
    """An inner size like the outer one: the shapes do not say which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize("cls", [Exchanged, Named, Square], ids=lambda cls: cls.__name__)
def test_roles_are_found_whatever_the_children_are_called(cls):
    model = net(cls)
    assert is_fused(model) == [True, True]
    compare(model)


# ---- MLPs that compute something else ----


class Clamped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x).clamp(max=7)) * self.up(x).clamp(-7, 7))


class Scaled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.999


class FunctionalDropout(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.01, self.training)


class DropoutChild(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class GateTwice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.gate(x))


class SkipsUp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)))


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OwnBuffer(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class OwnParameter(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class OwnAttribute(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 5.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-self.limit, self.limit)


class SizeAttribute(Mlp):
    """An attribute that equals a size by chance, and steers the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 8

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Noting(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return super().forward(x)


class AddsInput(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * (self.up(x) + 1))


class DetachedGate(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)).detach() * self.up(x))


class Float32(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.act(self.gate(x)).float() * self.up(x).float()).to(x.dtype))


class LastToken(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, -2))


class OtherActivation(Mlp):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())


class LeakyActivation(Mlp):
    def __init__(self) -> None:
        super().__init__(nn.LeakyReLU())


class InPlace(Mlp):
    """Right, but on a probe's leaf an activation cannot write."""

    def __init__(self) -> None:
        super().__init__(nn.SiLU(inplace=True))


class TwoActivations(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.other(self.up(x)))


class PackedTheOtherWay(Packed):
    """Rows of gate and up take turns, as in gpt-oss."""

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(both[..., 1::2] * self.act(both[..., ::2]))


class EvalOnly(Mlp):
    """The same in training; scaled in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else 2 * super().forward(x)


class ReadsTheWeights(Mlp):
    """It does not call its children, so an adapter on them has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(F.linear(x, self.gate.weight)) * F.linear(x, self.up.weight))


class ReadsThePackedWeight(Packed):
    def forward(self, x: Tensor) -> Tensor:
        packed = self.gate_up  # by another name, which `layers.weight_reads` does not follow
        gate, up = F.linear(x, packed.weight).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Upcast(Mlp):
    """In 16 bits the product is made in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.down((self.act(self.gate(x).to(wide)) * self.up(x).to(wide)).to(x.dtype))


OTHERS = [
    Clamped,
    Scaled,
    FunctionalDropout,
    DropoutChild,
    GateTwice,
    SkipsUp,
    Residual,
    OwnBuffer,
    OwnParameter,
    OwnAttribute,
    SizeAttribute,
    Noting,
    AddsInput,
    DetachedGate,
    Float32,
    LastToken,
    OtherActivation,
    LeakyActivation,
    InPlace,
    TwoActivations,
    PackedTheOtherWay,
    EvalOnly,
    ReadsThePackedWeight,
    Upcast,
]


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_an_mlp_that_computes_something_else_keeps_its_forward(cls):
    model = net(cls)
    assert is_fused(model) == [False, False]
    compare(model)


def test_an_mlp_that_reads_its_weights_without_calling_them_is_no_target():
    with pytest.raises(TargetError, match="ReadsTheWeights reads its weight without calling it"):
        net(ReadsTheWeights)


REASONS = {
    Scaled: "values",
    Clamped: "inputs of size",
    DropoutChild: "'dropout'",
    OwnBuffer: "'scale'",
    OtherActivation: "'act' (ReLU)",
    EvalOnly: "values",
    ReadsThePackedWeight: "the weight of 'gate_up' without calling it",
    Upcast: "values",
}


@pytest.mark.parametrize("cls", REASONS, ids=lambda cls: cls.__name__)
def test_the_reason_is_reported(cls):
    (row,) = [row for row in fused.report(net(cls)) if row.kind == "gated MLP"]
    assert REASONS[cls] in row.why_not
    assert (row.cls, row[2]) == (cls.__name__, 2)


def test_a_fresh_adapter_leaves_the_bits_of_an_mlp_that_upcasts():
    model = net(Upcast, dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    fused.release(twin)
    with torch.no_grad():
        for one in (model, twin):
            for name, p in one.named_parameters():
                if name.endswith(".B"):
                    p.zero_()
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    assert torch.equal(model(x), twin(x))
