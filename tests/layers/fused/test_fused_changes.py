"""Modules that are not like the one before, or are changed after attach: what is fused follows; and what a probe leaves
behind: nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_models import adapted, assert_same_gradients, build, counts, gradients, kinds, plain, tokens
from mlp_nets import Mlp, Named, Net, Packed, compare, is_fused, net
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused, gated_mlp

# ---- modules that are not like the first of their class ----


def odd_function(layer: nn.Module) -> None:
    layer.after = torch.abs  # not sin: of 1e8 in float64 it has 8 digits only


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


@pytest.mark.parametrize("child", ["drop", "same"])
def test_a_hook_on_a_child_that_does_nothing_has_its_effect(child):
    model = net(Named)
    assert is_fused(model) == [True, True]
    getattr(model.layers[0], child).register_forward_hook(lambda module, args, out: 2 * out)
    compare(model)


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


def test_a_class_that_is_patched_after_attach_is_followed(monkeypatch):
    model = net(Mlp)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.down(self.act(self.gate(x))))
    compare(model)


@pytest.mark.parametrize("how", ["name", "other name", "more"])
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


def test_modules_like_ones_that_were_probed_before_are_not_probed_again(monkeypatch):
    probed = []
    monkeypatch.setitem(
        fused.KINDS, fused.FusedGatedMlp, ("gated MLP", lambda m: probed.append(type(m)) or gated_mlp.match(m))
    )
    assert is_fused(net(Mlp)) == is_fused(net(Mlp)) == [True, True]
    assert probed.count(Mlp) == 1, "the second model's are like the first one's"
    assert is_fused(Net(Mlp(nn.GELU()), Mlp(nn.Tanh()), Mlp(bias=True))) == [True, False, True]
    assert probed.count(Mlp) == 4


def test_what_a_probe_said_of_one_config_does_not_go_for_another_one():
    class Scaled(Mlp):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(factor=factor)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.config.factor

    for factors in ((1.0, 3.0), (3.0, 1.0)):
        model = Net(*map(Scaled, factors))
        assert is_fused(model) == [factor == 1 for factor in factors]
        compare(model)
    before = len(fused._probed)
    assert is_fused(Net(Scaled(1.0), Scaled(3.0))) == [True, False]
    assert len(fused._probed) == before


def test_what_only_identity_tells_apart_is_not_remembered():
    class Switched(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.switch = object()  # its id may be another object's tomorrow

    assert is_fused(net(Switched)) == [False, False]
    assert [key for key in fused._probed if key[0] is Switched] == []


def test_a_child_class_that_is_patched_between_two_models_is_probed_again(monkeypatch):
    class Act(nn.SiLU):
        pass

    assert is_fused(net(lambda: Mlp(Act()))) == [True, True]
    monkeypatch.setattr(Act, "forward", lambda self, x: 2 * nn.functional.silu(x), raising=False)
    model = net(lambda: Mlp(Act()))
    assert is_fused(model) == [False, False]
    compare(model)


# ---- models ----


@pytest.mark.parametrize(
    "act", ["gelu_python_tanh", "relu", "gelu", "gelu_pytorch_tanh", "silu", "swish", "quick_gelu", "gelu_new"]
)
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
            return super().forward(x) + 0

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
        "class Hidden(LlamaMLP):\n"
        "    def forward(self, x):\n"
        "        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
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
            if k not in ("lora_roles", "lora_norm_variant", "lora_act")
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
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(mode, torch.enable_grad)
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
    assert not any(
        hasattr(m, name) for m in model.modules() for name in ("lora_roles", "lora_norm_variant", "lora_act")
    )


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
