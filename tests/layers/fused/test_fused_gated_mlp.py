"""Which modules are taken for a gated MLP, and that every other one computes what its own class does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_models import adapted, assert_same_gradients, build, counts, gradients, kinds, plain, tokens
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused


class Mlp(nn.Module):
    """As Llama's."""

    def __init__(self, act: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12, bias), nn.Linear(8, 12, bias), nn.Linear(12, 8, bias)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """As Phi-3's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = nn.Linear(8, 24, bias=False), nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Net(nn.Module):
    """Layers in a row, with a residual around each."""

    def __init__(self, *layers: nn.Module, dtype: torch.dtype = torch.float64, **lora) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)
        self.to(dtype)
        targets = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        lk.attach(self, lk.LoraConfig(**{"rank": 2, "targets": targets} | lora))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).to(x.dtype)
        return x


def net(cls: Callable[[], nn.Module], **how) -> Net:
    torch.manual_seed(0)
    return Net(cls(), cls(), **how)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(x)
    of = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), of, materialize_grads=True)]


def compare(model: nn.Module) -> None:
    """Values and gradients with those of a copy in which nothing is fused, in training and evaluation, for small and large inputs."""
    twin = copy.deepcopy(model)
    fused.release(twin)
    assert kinds(twin) == {}
    for size in (1e-3, 1.0, 30.0):
        x = size * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for training in (True, False):
            for a, e in zip(results(model.train(training), x), results(twin.train(training), x), strict=True):
                torch.testing.assert_close(a, e)


def is_fused(model: nn.Module) -> list[bool]:
    return [f"layers.{i}" in kinds(model) for i in range(len(model.layers))]


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


class Named(nn.Module):
    """Linears of other names, in another order; with an identity and a dropout that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.drop, self.w2, self.w1 = nn.Linear(8, 12), nn.Dropout(0.0), nn.Linear(12, 8), nn.Linear(8, 12)
        self.same, self.f = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.w2(self.same(self.f(self.w1(x)) * self.w3(x))))


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


OTHERS = [
    Clamped, Scaled, FunctionalDropout, DropoutChild, GateTwice, SkipsUp, Residual, OwnBuffer, OwnParameter, OwnAttribute, SizeAttribute, Noting,
    AddsInput, DetachedGate, Float32, LastToken, OtherActivation, LeakyActivation, InPlace, TwoActivations, PackedTheOtherWay,
]  # fmt: skip


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_an_mlp_that_computes_something_else_keeps_its_forward(cls):
    model = net(cls)
    assert is_fused(model) == [False, False]
    compare(model)


@pytest.mark.parametrize("cls", [Scaled, Clamped, DropoutChild, OwnBuffer, OtherActivation], ids=lambda cls: cls.__name__)
def test_the_reason_is_reported(cls):
    (row,) = [row for row in fused.report(net(cls)) if row.kind == "gated MLP"]
    said = {Scaled: "values", Clamped: "inputs of size", DropoutChild: "'dropout'", OwnBuffer: "'scale'", OtherActivation: "'act' (ReLU)"}
    assert said[cls] in row.why_not
    assert (row.cls, row[2]) == (cls.__name__, 2)


class EvalOnly(Mlp):
    """The same in training; scaled in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else 2 * super().forward(x)


class ReadsTheWeights(Mlp):
    """It does not call its children, so an adapter on them has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(F.linear(x, self.gate.weight)) * F.linear(x, self.up.weight))


@pytest.mark.xfail(strict=True, reason="the probe runs in train mode only, and without updates on the linears")
@pytest.mark.parametrize("cls", [EvalOnly, ReadsTheWeights], ids=lambda cls: cls.__name__)
def test_an_mlp_that_a_probe_could_take_for_another_computes_what_its_class_does(cls):
    compare(net(cls))


class Upcast(Mlp):
    """In 16 bits the product is made in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.down((self.act(self.gate(x).to(wide)) * self.up(x).to(wide)).to(x.dtype))


@pytest.mark.xfail(strict=True, reason="the probe runs in float64 only")
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


# ---- modules that are not like the first of their class ----


def odd_function(layer: nn.Module) -> None:
    layer.after = torch.sin


def odd_buffer(layer: nn.Module) -> None:
    layer.register_buffer("after_scale", torch.full((), 3.0, dtype=torch.float64))


def odd_activation(layer: nn.Module) -> None:
    layer.act.function = torch.relu


class Optional(Mlp):
    """Something may be done to the output."""

    after: Callable[[Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__(Given())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y = y if self.after is None else self.after(y)
        return y * self.after_scale if "after_scale" in self._buffers else y


class Given(nn.Module):
    """A function that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.function = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.xfail(
    strict=True,
    reason="what is known of one module is applied to others that differ in attributes that are no number or text, in buffers, or in their activation",
)
@pytest.mark.parametrize("odd", [odd_function, odd_buffer, odd_activation])
def test_a_layer_with_something_of_its_own_is_not_taken_for_the_one_before(odd):
    layers = [Optional(), Optional()]
    odd(layers[1])
    model = Net(*layers)
    compare(model)
    assert is_fused(model) == [True, False]


# ---- what is changed after attach ----


def test_an_activation_that_is_replaced_after_attach_is_used(calls):
    model = net(Mlp)
    model.layers[0].act = nn.ReLU()
    assert counts(calls, lambda: model(torch.randn(3, 8, dtype=torch.float64)))["gated_mlp"] == 1
    compare(model)


def test_a_linear_that_is_replaced_after_attach_is_used():
    model = net(Mlp)
    model.layers[0].up = nn.Linear(8, 12, dtype=torch.float64)
    compare(model)


@pytest.mark.parametrize("child", ["gate", "up", "down", "act"])
def test_hooks_put_on_after_attach_have_their_effect(child):
    model = net(Mlp)
    getattr(model.layers[1], child).register_forward_hook(lambda module, args, out: 2 * out)
    compare(model)


def test_a_hook_that_was_there_before_attach_has_its_effect():
    mlp, seen = Mlp(), []
    mlp.up.register_forward_hook(lambda module, args, out: seen.append(1) or 2 * out)
    compare(Net(mlp))
    assert seen


@pytest.mark.xfail(strict=True, reason="children that do nothing are not looked at again")
@pytest.mark.parametrize("child", ["drop", "same"])
def test_a_hook_on_a_child_that_does_nothing_has_its_effect(child):
    model = net(Named)
    assert is_fused(model) == [True, True]
    getattr(model.layers[0], child).register_forward_hook(lambda module, args, out: 2 * out)
    compare(model)


@pytest.mark.xfail(strict=True, reason="children that do nothing are not looked at again")
def test_a_dropout_that_is_turned_on_after_attach_drops():
    model = net(Named)
    model.layers[0].drop.p = 0.5
    compare(model)


def test_a_forward_set_on_the_instance_is_used():
    early, late = Mlp(), net(Mlp)
    early.forward = lambda x: x.sin()
    model = Net(early, Mlp())
    assert is_fused(model) == [False, True]
    compare(model)
    late.layers[0].forward = lambda x: x.sin()
    compare(late)


def test_a_class_that_is_patched_before_attach_is_probed_as_it_is(monkeypatch):
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.down(self.act(self.gate(x))))
    model = net(Mlp)
    assert is_fused(model) == [False, False]
    compare(model)


@pytest.mark.xfail(strict=True, reason="the class's forward is not looked at again")
def test_a_class_that_is_patched_after_attach_is_followed(monkeypatch):
    model = net(Mlp)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.down(self.act(self.gate(x))))
    compare(model)


OTHER_NAME = pytest.mark.xfail(strict=True, raises=TypeError, reason="the fused forward knows its input as x only")


@pytest.mark.parametrize("how", ["name", pytest.param("other name", marks=OTHER_NAME), "more"])
def test_arguments_are_handed_on_as_they_come(how):
    class Asked(Mlp):
        def forward(self, hidden_states: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(hidden_states) * factor

    cls = Mlp if how == "name" else Asked
    mlp, x = net(cls).layers[0], torch.randn(3, 8, dtype=torch.float64)
    assert kinds(mlp)
    found = {"name": lambda: mlp(x=x), "other name": lambda: mlp(hidden_states=x), "more": lambda: mlp(x, 2.0)}[how]()
    torch.testing.assert_close(found, mlp(x) * (2 if how == "more" else 1))


@pytest.mark.parametrize("cls", [Mlp, Packed], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 1, 3, 8)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_may_be_changed_in_place(cls, shape, training):
    model, x = net(cls, dropout=0.3).train(training), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mlp, found = model.layers[0], []
    of = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    for in_place in (True, False):
        torch.manual_seed(0)
        y = mlp(x)
        y = y.add_(x).relu_() if in_place else (y + x).relu()
        found.append([y, *torch.autograd.grad(y.square().sum(), of)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- models ----


@pytest.mark.parametrize("act", ["gelu_python_tanh", "relu", "gelu", "gelu_pytorch_tanh", "silu", "swish", "quick_gelu", "gelu_new"])
def test_only_known_activations_of_transformers_are_fused(act, calls):
    base, model = build(hidden_act=act), adapted(trained=False, config={"hidden_act": act})
    known = act in ("gelu", "gelu_pytorch_tanh", "silu", "swish")
    assert counts(calls, lambda: model(tokens()))["gated_mlp"] == 2 * known
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)


def test_a_subclass_with_a_forward_of_its_own_is_judged_by_what_it_computes():
    from transformers.models.llama.modeling_llama import LlamaMLP

    class TwiceMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class SameMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y

    for cls, fits in ((TwiceMLP, False), (SameMLP, True)):
        model = build()
        for layer in model.model.layers:
            layer.mlp.__class__ = cls
        expected = model(tokens()).logits
        lk.attach(model, lk.LoraConfig(rank=2, targets=["gate_proj", "q_proj"]))
        assert ("FusedGatedMlp" in kinds(model).values()) == fits
        assert torch.equal(model(tokens()).logits, expected)
        lk.detach(model)
        assert type(model.model.layers[0].mlp) is cls


def test_a_class_without_source_text_is_fused_if_it_fits():
    from transformers.models.llama.modeling_llama import LlamaMLP

    scope = {"LlamaMLP": LlamaMLP}
    exec(
        "class Hidden(LlamaMLP):\n    def forward(self, x):\n        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        scope,
    )
    model = build()
    model.model.layers[0].mlp.__class__ = scope["Hidden"]
    lk.attach(model, lk.LoraConfig(rank=2, targets=["gate_proj"]))
    assert {n for n, k in kinds(model).items() if k == "FusedGatedMlp"} == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_an_mlp_without_an_adapted_linear_is_left_alone():
    model = adapted(targets=["q_proj"])
    assert set(kinds(model).values()) == {"FusedRmsNorm"}
    assert_same_gradients(gradients(model), gradients(plain(model)))


# ---- what a probe leaves behind ----


def inside(model: nn.Module) -> dict:
    return {
        n: {
            k: (id(v), None if k == "_modules" else repr(v))
            for k, v in m.__dict__.items()
            if k not in ("lora_roles", "lora_form", "lora_act")
        }
        | {"class": type(m).__bases__[-1] if n in kinds(model) else type(m)}
        for n, m in model.named_modules()
    }


@pytest.mark.parametrize("mode", ["", "no_grad", "inference_mode", "meta", "bf16 by default", "autocast", "eval"])
def test_probing_leaves_the_generator_and_everything_of_the_model_as_it_was(mode):
    model = adapted("Qwen3")
    expected = kinds(model)
    fused.release(model)
    model = model.to("meta") if mode == "meta" else model.train(mode != "eval")
    before, versions = inside(model), [p._version for p in model.parameters()]
    around = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(mode, torch.enable_grad)  # fmt: skip
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if mode == "bf16 by default" else default)
        with around():
            fused.adopt(model)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(model) == expected
    assert inside(model) == before
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())
    fused.release(model)
    assert kinds(model) == {}
    assert not any(hasattr(m, name) for m in model.modules() for name in ("lora_roles", "lora_form", "lora_act"))


def test_a_model_made_in_inference_mode_is_fused_too():
    with torch.inference_mode():
        model = adapted()
    assert set(kinds(model).values()) == {"FusedGatedMlp", "FusedRmsNorm"}


def test_the_report_changes_nothing():
    model = adapted()
    before, state = inside(model), torch.get_rng_state()
    rows = fused.report(model)
    assert inside(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert rows == fused.report(model)
