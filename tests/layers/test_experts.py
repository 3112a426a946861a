"""LoRA on experts held as 3-D parameters: against PEFT's `target_parameters` and against the changed weights."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import peft
import pytest
import torch
from architectures import MOE, causal_lm
from made_experts import LAYOUTS, adapted, ids, llama4, logits, moe, randomise
from torch import nn

import lorakit as lk
from lorakit.adapter.experts import ExpertFactors
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.layers.expert_weight import ExpertWeight, is_experts
from lorakit.layers.targets import module_names
from lorakit.model.state import layer_at

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def in_peft(architecture: str, **settings) -> nn.Module:
    """A model with a PEFT adapter on its queries and experts, with values that change the output."""
    torch.manual_seed(2)
    named = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    return peft.get_peft_model(moe(architecture), peft.LoraConfig(**named | settings, init_lora_weights=False)).eval()


def changed(model: nn.Module, adapter: lk.Adapter, weight: float = 1.0) -> nn.Module:
    """The base with ΔW in its weights, in float64 until it is added."""
    with torch.no_grad():
        for name, update in adapter.updates.items():
            W = model.get_parameter(update.weight_name(name))
            W += weight * update.map(lambda _, t: t.double()).delta(tuple(W.shape)).to(W.dtype)
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-6 of the largest element: float32's rounding is half of that."""
    torch.testing.assert_close(found, expected, atol=1e-6 * max(1.0, float(expected.detach().abs().max())), rtol=0)


# ---------------------------------------------------------------------------------- the oracle: PEFT


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_pefts_adapter_gives_the_same_output_here(architecture, tmp_path):
    theirs = in_peft(architecture)
    theirs.save_pretrained(tmp_path)
    ours = lk.attach(moe(architecture), lk.Adapter.load(tmp_path))
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_an_adapter_trained_here_has_pefts_output_and_gradients(architecture, tmp_path):
    ours = adapted(architecture, targets=["q_proj", "experts"], rank_pattern={"experts.down_proj": 2})
    adapter = lk.capture(ours)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe(architecture), tmp_path, is_trainable=True).eval()
    batch = ids()
    out, expected = ours(batch, labels=batch), theirs(batch, labels=batch)
    close(out.logits, expected.logits)
    out.loss.backward()
    expected.loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, update in adapter.updates.items():
        own = layer_at(ours, name)._modules["lora_default"]
        holder, _, parameter = name.rpartition(".")
        if isinstance(update, ExpertFactors):
            inner = ".base_layer" if parameter != "down_proj" else ""
            A = own.A.grad.flatten(0, 1)
            B = own.B.grad.permute(1, 2, 0).flatten(1)
            key = f"base_model.model.{holder}{inner}"
        else:
            A, B, key = own.A.grad, own.B.grad, f"base_model.model.{name}"
        torch.testing.assert_close(A, grads.pop(f"{key}.lora_A.default.weight"), atol=1e-6, rtol=0)
        torch.testing.assert_close(B, grads.pop(f"{key}.lora_B.default.weight"), atol=1e-6, rtol=0)
    assert not grads


@pytest.mark.parametrize("parameters", [["experts.down_proj"], ["gate_up_proj"], ["mlp.experts.gate_up_proj"]], ids=str)
def test_one_parameter_alone_is_read_and_written(parameters, tmp_path):
    theirs = in_peft("mixtral", target_modules=[], target_parameters=parameters)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.attach(moe("mixtral"), lk.Adapter.load(tmp_path / "theirs"))
    last = parameters[0].rpartition(".")[2]
    assert {name.rpartition(".")[2] for name in lk.capture(ours).updates} == {last}
    close(logits(ours), logits(theirs))
    lk.capture(ours).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(theirs))


def test_rslora_and_alphas_by_name_mean_the_same_in_peft(tmp_path):
    settings = {"rslora": True, "alpha_pattern": {"experts.down_proj": 1.5}}
    ours = adapted("mixtral", targets=["experts", "v_proj"], **settings)
    lk.capture(ours).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path).eval()
    close(logits(theirs), logits(ours))


# ---------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("architecture", MOE)
def test_it_computes_what_the_changed_weights_do(architecture, implementation):
    base = causal_lm(architecture)
    base.set_experts_implementation(implementation)
    model = copy.deepcopy(base)
    before = logits(model)
    randomise(lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"])))
    adapter = lk.capture(model)
    assert {n.rpartition(".")[2] for n in adapter.updates} == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(logits(model), logits(changed(copy.deepcopy(base), adapter)), atol=1e-4, rtol=1e-4)
    lk.activate(model, None)
    assert torch.equal(logits(model), before)


def test_experts_without_a_gate_are_adapted_too():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=60,
        hidden_size=32,
        layers_block_type=["moe", "attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
    )
    base = NemotronHForCausalLM(config).eval()
    model = randomise(lk.attach(copy.deepcopy(base), lk.LoraConfig(rank=2, targets=["experts"])))
    adapter = lk.capture(model)
    assert {n.rpartition(".")[2] for n in adapter.updates} == {"up_proj", "down_proj"}
    torch.testing.assert_close(logits(model), logits(changed(copy.deepcopy(base), adapter)), atol=1e-5, rtol=1e-4)


def choices(tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, each token's two experts of four, and their weights."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 32, generator=generator), index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype, architecture):
    model = adapted(architecture, targets=["experts"])
    expected = changed(moe(architecture), lk.capture(model)).double()
    expected.set_experts_implementation("eager")
    x, index, weights = choices()
    own, exact = (m.model.layers[0].mlp.experts for m in (model.to(dtype), expected))
    found = own(x.to(dtype), index, weights.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(
        found.double(), exact(x.double(), index, weights.double()), atol=tolerance, rtol=tolerance
    )
    (found.float() ** 2).sum().backward()
    factors = [p for p in own.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in factors)


def test_autocast_keeps_the_precision_of_the_experts():
    own = adapted("mixtral", targets=["experts"]).model.layers[0].mlp.experts
    x, index, weights = choices()
    with torch.autocast("cpu", torch.bfloat16):
        found = own(x, index, weights)
        low = own(x.bfloat16(), index, weights)
    close(found, own(x, index, weights))
    torch.testing.assert_close(low.float(), found, atol=3e-2, rtol=3e-2)


def test_gradients_are_those_of_finite_differences():
    experts = next(m for m in moe("gpt_oss").modules() if is_experts(m)).double()
    model = nn.ModuleDict({"experts": experts})
    randomise(lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"])))
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [3, 0], [1, 2], [0, 3], [2, 0]])
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    torch.autograd.gradcheck(lambda *_: experts(x, index, weights), (x, weights, *trained))


def test_a_fresh_adapter_changes_no_bit_and_trains_its_factors_alone():
    model = moe("mixtral")
    before = logits(model)
    lk.attach(model, lk.LoraConfig(rank=2))
    assert torch.equal(logits(model), before)
    model(ids(), labels=ids()).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".lora_default." in n}
    experts = [n for n in with_gradient if ".experts." in n]
    assert len(experts) == 2 * 2 * 2


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    model = adapted("mixtral", targets=["down_proj"])
    model(ids(1, 2), labels=ids(1, 2)).loss.backward()  # 4 choices of 4 experts, in each of two layers
    layer = layer_at(model, "model.layers.0.mlp.experts.down_proj")
    own = layer._modules["lora_default"]
    unused = [e for e in range(4) if not own.B.grad[e].any()]
    assert own.A.grad.shape == own.A.shape
    assert all(not own.A.grad[e].any() for e in unused)


def test_dropout_acts_in_training_alone():
    model = randomise(lk.attach(moe("mixtral"), lk.LoraConfig(rank=2, targets=["experts"], dropout=0.5)))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted("mixtral", dropout=0.25).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(ids(), labels=ids()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][n]) for n, grad in grads[0].items())


def test_compiled_layers_fall_back_where_they_must():
    model = adapted("mixtral")
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------- as part of a model


def test_detach_leaves_the_model_as_it_was():
    model = moe("mixtral")
    classes, keys, before = [type(m) for m in model.modules()], list(model.state_dict()), logits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    randomise(lk.attach(model, lk.LoraConfig(rank=2), name="a"), "a")
    randomise(lk.attach(model, lk.LoraConfig(rank=2, targets=["down_proj"]), name="b"), "b")
    experts = model.model.layers[0].mlp.experts
    assert type(experts).__name__ == "LoraMixtralExperts"
    assert isinstance(experts, type(moe("mixtral").model.layers[0].mlp.experts))
    lk.detach(model, "a")
    assert [n for n, m in experts.named_children() if isinstance(m, ExpertWeight)] == ["lora_down_proj"]
    lk.detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_merged_it_computes_the_same_and_unmerged_every_bit_is_back(architecture):
    model = adapted(architecture)
    weights = {n: p.clone() for n, p in model.named_parameters() if ".lora_" not in n}
    expected = logits(model)
    for _ in range(3):
        lk.merge(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
        assert not torch.equal(
            model.model.layers[0].mlp.experts.down_proj, weights["model.layers.0.mlp.experts.down_proj"]
        )
        lk.unmerge(model)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert torch.equal(logits(model), expected)


def test_several_adapters_add_up_with_their_weights():
    model = adapted("mixtral")
    a = lk.capture(model)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["down_proj", "k_proj"]), name="b")
    randomise(model, "b", seed=7)
    b = lk.capture(model, "b")
    lk.activate(model, {"default": 0.5, "b": -2.0})
    expected = changed(changed(moe("mixtral"), a, 0.5), b, -2.0)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=0)


def test_each_row_of_a_batch_has_its_own_adapter():
    model = adapted("mixtral")
    randomise(lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"]), name="b"), "b", seed=9)
    batch, choices = ids(4), ["default", None, {"default": -1.0, "b": 0.5}, "b"]
    expected = []
    for row, choice in zip(batch, choices, strict=True):
        lk.activate(model, choice)
        expected.append(logits(model, row[None]))
    with lk.route(model, choices):
        torch.testing.assert_close(logits(model, batch), torch.cat(expected), atol=1e-6, rtol=0)
    with lk.route(model, choices, repeat=2):
        found = logits(model, batch.repeat_interleave(2, dim=0))
    torch.testing.assert_close(found, torch.cat(expected).repeat_interleave(2, dim=0), atol=1e-6, rtol=0)


def test_each_token_of_a_packed_batch_has_its_own_adapter():
    model = adapted("mixtral", targets=["experts"])
    rows = ids(2, 5)
    expected = []
    for row, choice in zip(rows, ["default", None], strict=True):
        lk.activate(model, choice)
        expected.append(logits(model, row[None]))
    positions = torch.arange(5).repeat(2)[None]
    mask = torch.full((10, 10), float("-inf"))
    mask[:5, :5], mask[5:, 5:] = (torch.full((5, 5), float("-inf")).triu(1) for _ in range(2))
    with torch.no_grad(), lk.route(model, ["default"] * 5 + [None] * 5, per="token"):
        found = model(rows.reshape(1, -1), position_ids=positions, attention_mask=mask[None, None]).logits
    torch.testing.assert_close(found[0], torch.cat(expected, dim=1)[0], atol=1e-5, rtol=0)


def test_training_two_adapters_on_rows_of_one_batch_equals_training_each():
    model = adapted("mixtral", targets=["experts"])
    randomise(lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"]), name="b", trainable=True), "b", seed=9)
    batch, alone = ids(2), {}
    for row, name in zip(batch, ("default", "b"), strict=True):
        lk.activate(model, name)
        model.zero_grad()
        model(row[None]).logits.square().sum().backward()
        alone |= {n: p.grad.clone() for n, p in model.named_parameters() if f".lora_{name}." in n}
    model.zero_grad()
    with lk.route(model, ["default", "b"]):
        model(batch).logits.square().sum().backward()
    for name, grad in alone.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("choices", [["default", None], ["default"] * 5], ids=len)
def test_a_batch_of_another_number_of_rows_is_an_error(choices):
    model = adapted("mixtral", targets=["experts"])
    with lk.route(model, choices), pytest.raises(StateError, match=r"experts.*'?was given"):
        logits(model, ids(4))


def test_generation_and_copies_keep_the_adapter():
    model = adapted("mixtral")
    new = model.generate(ids(1, 4), max_new_tokens=5, do_sample=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
        assert torch.equal(copied.generate(ids(1, 4), max_new_tokens=5, do_sample=False), new)
        experts = copied.model.layers[0].mlp.experts
        assert experts.lora_down_proj.weight is experts.down_proj


def test_the_state_dict_of_the_base_still_fits_and_the_factors_are_beside_it():
    model = adapted("mixtral")
    base = moe("mixtral").state_dict()
    assert base.keys() <= model.state_dict().keys()
    own = [key for key in model.state_dict() if key not in base]
    assert "model.layers.1.mlp.experts.lora_gate_up_proj.lora_default.A" in own
    assert all(".lora_default." in key for key in own)


def test_captured_and_attached_again_every_bit_is_the_same():
    model = adapted("gpt_oss")
    adapter = lk.capture(model).check()
    again = lk.attach(moe("gpt_oss"), adapter)
    assert torch.equal(logits(again), logits(model))
    assert adapter.rank == 3
    assert adapter.digest() == lk.capture(again).digest()
    kinds = {type(u).__name__ for u in adapter.updates.values()}
    assert kinds == {"Factors", "ExpertFactors"}


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
