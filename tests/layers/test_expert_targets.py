"""Which experts an adapter targets, and what is listed or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import MOE, causal_lm
from made_experts import LAYOUTS, adapted, close, llama4, logits, moe, randomise
from torch import nn

import lorakit as lk
from lorakit.adapter.experts import ExpertFactors
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.layers.expert_weight import ExpertWeight
from lorakit.layers.targets import module_names
from lorakit.model.state import layer_at

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


# ---------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("architecture", MOE)
def test_all_linear_includes_the_experts_and_says_so(architecture):
    model = causal_lm(architecture)
    lk.attach(model, lk.LoraConfig(rank=2))
    experts = [name for name, m in module_names(model).items() if isinstance(m, ExpertWeight)]
    assert experts
    found = lk.summary(model)
    assert {row.name for row in found.rows} >= set(experts)
    assert f"default: {experts[0].rpartition('.')[2]}" in str(found)
    left = found.unreached.names if found.unreached else {}
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in left)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"targets": ["gate_up_proj"]}, ["gate_up_proj"]),
        ({"targets": ["experts.down_proj", "q_proj"]}, ["down_proj"]),
        ({"targets": ["experts"]}, ["down_proj", "gate_up_proj"]),
        ({"targets": r".*\.experts\.(gate_up|down)_proj"}, ["down_proj", "gate_up_proj"]),
        ({"targets": r".*\.experts"}, ["down_proj", "gate_up_proj"]),
        ({"exclude": ["experts"]}, []),
        ({"exclude": ["gate_up_proj"]}, ["down_proj"]),
        ({"targets": ["experts"], "exclude": ["down_proj"]}, ["gate_up_proj"]),
    ],
    ids=str,
)
def test_a_config_names_or_excludes_them(settings, parameters):
    model = lk.attach(moe("mixtral"), lk.LoraConfig(rank=2, **settings))
    updates = lk.capture(model).updates
    found = {n.rpartition(".")[2] for n, u in updates.items() if isinstance(u, ExpertFactors)}
    assert sorted(found) == parameters


def test_rank_and_layers_are_chosen_by_name():
    config = lk.LoraConfig(rank=4, targets=["experts"], rank_pattern={"down_proj": 1}, layers=[1])
    updates = lk.capture(lk.attach(moe("mixtral"), config)).updates
    assert {n: u.rank for n, u in updates.items()} == {
        "model.layers.1.mlp.experts.gate_up_proj": 4,
        "model.layers.1.mlp.experts.down_proj": 1,
    }


@pytest.mark.parametrize("settings", [{"variant": "loha"}, {"init": "pissa"}], ids=str)
def test_what_experts_cannot_have_is_listed_or_refused(settings):
    (key, value), *_ = settings.items()
    if key == "variant":
        model = lk.attach(moe("mixtral"), lk.LoraConfig(rank=2, **settings))
        skipped = lk.summary(model).skipped
        assert f"not '{value}'" in skipped["model.layers.0.mlp.experts.down_proj"]
        assert "not 'loha'" in str(lk.summary(model))
    with pytest.raises(TargetError, match=rf"experts\.gate_up_proj' cannot be adapted.*'{value}'"):
        lk.attach(moe("mixtral"), lk.LoraConfig(rank=2, targets=["experts"], **settings))


def test_experts_without_the_interface_are_listed_with_the_reason():
    model = llama4()
    with pytest.raises(TargetError, match=r"experts.gate_up_proj' cannot be adapted: its gate_up_proj \[4, 32, 32\]"):
        lk.attach(model, lk.LoraConfig(rank=2, targets=["gate_up_proj"]))
    lk.attach(model, lk.LoraConfig(rank=2))
    found = lk.summary(model)
    experts = next(n for n in found.skipped if n.endswith("experts"))
    assert "without transformers' experts interface" in found.skipped[experts]
    assert any("experts.gate_up_proj" in n for n in found.unreached.names)


def test_a_module_that_computes_something_else_is_refused_and_left_alone():
    model = moe("mixtral")
    experts = model.model.layers[0].mlp.experts

    class Scaled(type(experts)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    experts.__class__ = Scaled
    before = logits(model)
    with pytest.raises(TargetError, match="a Scaled computes something else"):
        lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"]))
    assert type(experts) is Scaled
    assert not [n for n, _ in model.named_modules() if "lora_" in n]
    assert torch.equal(logits(model), before)


def test_an_offloading_hook_stays_around_the_adapted_forward():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    weights = {n: p.detach().clone() for n, p in experts.named_parameters()}
    add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    assert experts.down_proj.is_meta
    base = logits(model)
    randomise(lk.attach(model, lk.LoraConfig(rank=3, alpha=6.0)))
    close(logits(model), logits(adapted("mixtral")))
    assert experts.down_proj.is_meta
    with pytest.raises(StateError, match="is offloaded"):
        lk.merge(model)
    lk.detach(model)
    assert torch.equal(logits(model), base)


def test_quantized_experts_are_listed_with_the_reason_and_refused_by_name():
    model = moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    config = lk.LoraConfig(rank=2)
    lk.attach(model, config)
    skipped = lk.summary(model).skipped
    assert "down_proj is stored as float8_e4m3fn" in skipped["model.layers.0.mlp.experts"]
    lk.detach(model)
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts.*float8"):
        lk.attach(model, config.replace(targets=["experts"]))


# ---------------------------------------------------------------------------------- what does not fit


def test_factors_of_other_sizes_are_refused_and_the_model_is_left_alone():
    adapter = lk.capture(adapted("mixtral", targets=["experts"]))
    wrong = replace(
        adapter, updates={n: u.map(lambda _, t: t[:2].clone()) for n, u in adapter.updates.items()}, metadata={}
    )
    model = moe("mixtral")
    before = [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj'.*expected A \[4, 3, 32\]"):
        lk.attach(model, wrong)
    assert [type(m) for m in model.modules()] == before


def test_an_update_of_a_linear_on_experts_and_the_reverse_are_refused():
    experts = "model.layers.0.mlp.experts.down_proj"
    stack = lk.capture(adapted("mixtral", targets=["experts"])).updates[experts]
    linear = lk.capture(adapted("mixtral", targets=["q_proj"])).updates["model.layers.0.self_attn.q_proj"]
    for name, update in ((experts, linear), ("model.layers.0.self_attn.q_proj", stack)):
        with pytest.raises(AdapterError, match=name.rpartition(".")[2]):
            lk.attach(moe("mixtral"), lk.Adapter(lk.LoraConfig(targets=[name]), {name: update}))


def test_values_that_are_not_finite_are_not_merged():
    model = adapted("mixtral", targets=["experts"])
    name = "model.layers.1.mlp.experts.down_proj"
    weights = {n: p.clone() for n, p in model.named_parameters() if ".lora_" not in n}
    with torch.no_grad():
        layer_at(model, name)._modules["lora_default"].A[0, 0, 0] = float("nan")
    with pytest.raises(StateError, match=name.replace(".", r"\.")):
        lk.merge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_a_module_called_in_another_way_says_so():
    model = adapted("mixtral", targets=["experts"])
    with pytest.raises(StateError, match=r"called with 1 tensors"):
        model.model.layers[0].mlp.experts(torch.randn(2, 32), torch.tensor([[0], [1]]))


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_save_pretrained_writes_the_base_and_the_adapter_beside_it(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(architecture, targets=["q_proj", "experts"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.equal(logits(again), logits(moe(architecture)))
    close(logits(again), logits(model))
    lk.merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)
