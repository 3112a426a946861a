"""Where a fused module steps aside for its own class's forward: hooks, casting, compilers, several adapters.
(Attention: see its own file.)
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from fused_models import adapted, assert_same_gradients, build, counts, factors, gradients, plain, tokens
from torch import nn

import lorakit as lk

# ---- something waits for a child's own call ----


@pytest.mark.parametrize(
    "child", ["mlp.gate_proj", "mlp.down_proj", "mlp.act_fn", "self_attn.k_proj", "self_attn.o_proj"]
)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_a_child_are_called(child, kind, calls):
    model, seen = adapted(), []
    expected = gradients(plain(model))
    module = model.model.layers[1].get_submodule(child)
    getattr(module, f"register_{kind}_hook")(lambda module, *_: seen.append(module))
    done = counts(calls, lambda: assert_same_gradients(gradients(model), expected))
    assert seen == [module]
    # Linears of the attention are nodes by themselves, those of the MLP if it steps aside.
    assert (done["gated_mlp"], done["project"]) == ((1, 8 + 3) if child.startswith("mlp") else (2, 8))


def test_a_hook_that_changes_a_childs_output_has_its_effect():
    model = adapted()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    torch.testing.assert_close(model(tokens()).logits, plain(model)(tokens()).logits, atol=1e-4, rtol=1e-5)
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_hooks_on_the_fused_module_itself_are_called_around_it(calls):
    model, seen = adapted(), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert counts(calls, lambda: gradients(model))["gated_mlp"] == 2
    assert seen == [(2, 9, 32)]


def test_global_module_hooks_are_called_for_every_child():
    model, seen = adapted(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        gradients(model)
    finally:
        handle.remove()
    assert {m for n, m in model.named_modules() if n.endswith("_proj")} <= seen


def test_detach_keeps_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Seen(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.count += 1
            return args, kwargs

    base = build()(tokens()).logits
    for early in (True, False):
        model = build()
        named = [
            model.model.layers[0].mlp,
            model.model.layers[0].mlp.up_proj,
            model.model.layers[1].self_attn,
            model.model.norm,
        ]
        for attach in [False, True] if early else [True, False]:
            if attach:
                lk.attach(model, lk.LoraConfig(rank=4))
            else:
                for module in named:
                    add_hook_to_module(module, Seen())
        expected = gradients(plain_of_factors := tiny.randomise_factors(model, size=0.1))
        Seen.count = 0
        assert_same_gradients(gradients(plain_of_factors), expected)
        assert Seen.count == len(named)
        lk.detach(model)
        assert torch.equal(model(tokens()).logits, base)
        for module in named:
            remove_hook_from_module(module)
        assert torch.equal(model(tokens()).logits, base)
        assert type(named[0]) is type(build().model.layers[0].mlp)


# ---- precision, compilers, checkpointing ----


def test_autocast_computes_what_the_plain_path_does():
    model = adapted()
    found = []
    for one in (model, plain(model)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(one))
    assert_same_gradients(*found, tolerance=0.02)


@pytest.mark.parametrize("forward", [True, False])
def test_backward_may_run_under_another_autocast_than_forward(forward):
    model = adapted()
    expected = gradients(model)
    model.zero_grad()
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        with torch.autocast("cpu", enabled=False):
            loss = model(input_ids=ids, labels=ids).loss
        if forward:
            loss.backward()
    if not forward:
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # the model's own products run in bf16 then
    assert_same_gradients({n: found[n] for n in expected}, expected, tolerance=0.02)


def test_a_float64_model_trains_as_the_plain_path_does():
    model = adapted("Qwen3").double()
    ours, theirs = gradients(model), gradients(plain(model))
    assert {g.dtype for g in ours.values()} == {torch.float64}
    assert_same_gradients(ours, theirs, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma", "Phi3"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, dropout, reentrant):
    model = adapted(kind, dropout=dropout)
    model.enable_input_require_grads()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model), expected, tolerance=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj", "down_proj"], ["up_proj"], ["q_proj", "down_proj"]], ids="+".join
)
@pytest.mark.parametrize("early", [True, False], ids=["hooks in forward", "hooks in backward"])
def test_hooks_put_on_or_off_before_backward_do_not_change_the_masks_of_checkpointing(reentrant, targets, early):
    """What is fused changes between the two runs of a layer, not what it computes."""
    model = adapted(dropout=0.4, targets=targets, config={"num_hidden_layers": 3})
    model.enable_input_require_grads()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def hook() -> list:
        return [layer.mlp.up_proj.register_forward_hook(lambda *_: None) for layer in model.model.layers]

    handles = hook() if early else []
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    if early:
        [handle.remove() for handle in handles]
    else:
        hook()
    if reentrant:  # the other kind compares what both runs keep, and says so
        loss.backward()
        assert_same_gradients({n: p.grad for n, p in factors(model).items()}, expected)
        return
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_the_loss_without_gradients_is_that_with_the_same_dropout():
    """What reentrant checkpointing needs: both of its runs draw the same masks."""
    model, losses = adapted(dropout=0.4), []
    for grad in (True, False):
        torch.manual_seed(5)
        with torch.set_grad_enabled(grad):
            losses.append(model(tokens(), labels=tokens()).loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["Qwen3", pytest.param("Gemma", marks=pytest.mark.slow)])
def test_a_compiled_model_trains_the_same(kind):
    model = adapted(kind, config={"num_hidden_layers": 1})
    expected = gradients(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    assert_same_gradients({n: p.grad for n, p in factors(twin).items()}, expected)
    torch._dynamo.reset()


def test_inference_mode_and_no_grad_compute_the_same_bits_without_the_nodes(calls):
    model = adapted().eval()
    with torch.no_grad():
        expected = plain(model)(tokens()).logits

    def run() -> None:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert torch.equal(model(tokens()).logits, expected)

    assert not any(counts(calls, run).values())
    assert model(tokens()).logits.requires_grad


def test_functional_calls_and_vmap_compute_the_same():
    model = adapted().eval()
    parameters = dict(model.named_parameters())
    expected = model(tokens()).logits.detach()
    found = torch.func.functional_call(model, parameters, (tokens(),)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    grads = torch.func.grad(
        lambda p: torch.func.functional_call(model, parameters | p, (tokens(),)).logits.square().mean()
    )
    some = {n: p for n, p in parameters.items() if "layers.0.mlp.up_proj.lora_default" in n}
    model(tokens()).logits.square().mean().backward()
    for name, g in grads(some).items():
        torch.testing.assert_close(g, parameters[name].grad, atol=1e-6, rtol=1e-4)


def test_fused_modules_on_meta_give_shapes():
    layer = adapted(trained=False, dropout=0.1).to("meta").model.layers[0]
    x = torch.empty(2, 9, 32, device="meta")
    assert layer.mlp(x).shape == layer.self_attn.o_proj(x).shape == layer.input_layernorm(x).shape == x.shape


# ---- adapters ----


def two_adapters() -> nn.Module:
    model = adapted()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj", "up_proj"]), name="b")
    tiny.randomise_factors(model, 4, size=0.1)
    return model


def test_several_active_adapters_add_up_with_their_weights():
    model = two_adapters()
    lk.activate(model, {"default": 0.7, "b": -0.4})
    for p in factors(model).values():
        p.requires_grad_()
    ours = gradients(model)
    assert len(ours) == 2 * 2 * (7 + 2)
    assert_same_gradients(ours, gradients(plain(model)))


def test_rows_with_adapters_of_their_own_get_each_its_own():
    model = two_adapters()
    ids, expected = tokens(3), []
    for row, choice in enumerate(choices := ["b", None, "default"]):
        lk.activate(model, choice)
        expected.append(plain(model)(ids[row : row + 1]).logits)
    lk.activate(model, "default")
    with lk.route(model, choices):
        torch.testing.assert_close(model(ids).logits, torch.cat(expected), atol=1e-4, rtol=1e-5)


def test_dropout_acts_in_training_only_and_differs_with_each_draw():
    model = adapted(dropout=0.5)
    one, same, other = gradients(model, seed=1), gradients(model, seed=1), gradients(model, seed=2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    model.eval()
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(model, seed=1).values(), gradients(model, seed=2).values(), strict=True)
    )
    assert_same_gradients(gradients(model), gradients(plain(model)))


@pytest.mark.parametrize("targets", [["up_proj"], ["down_proj"], ["up_proj", "down_proj"]], ids="+".join)
def test_the_dropout_of_an_mlps_linears_is_unbiased(targets):
    """The mean over many draws nears the output without dropout. (Not so behind an activation: gate's.)"""
    mlp = adapted(targets=targets, dropout=0.2).model.layers[0].mlp
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    whole = mlp.eval()(x).detach()
    mlp.train()
    torch.manual_seed(0)
    draws = torch.stack([mlp(x).detach() for _ in range(500)])
    off = (draws.mean(0) - whole) / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0
    assert 0.5 < float(off.square().mean()) < 1.5  # 64 rows of rank 4: 1 ± 0.1


def test_linears_with_different_dropouts_compute_each_its_own(calls):
    model = adapted(dropout=0.3)
    model.model.layers[0].mlp.up_proj.lora_default.dropout = 0.6
    assert counts(calls, lambda: gradients(model))["gated_mlp"] == 1
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_unfreezing_a_weight_of_the_base_gives_its_gradient(calls):
    model = adapted()
    weights = [
        model.model.layers[0].mlp.up_proj.weight,
        model.model.layers[0].self_attn.k_proj.weight,
        model.model.norm.weight,
    ]
    twin = plain(model)
    same = [
        twin.model.layers[0].mlp.up_proj.weight,
        twin.model.layers[0].self_attn.k_proj.weight,
        twin.model.norm.weight,
    ]
    for w in (*weights, *same):
        w.requires_grad_()
    assert counts(calls, lambda: gradients(model))["gated_mlp"] == 1
    assert_same_gradients(gradients(model), gradients(twin))
    for ours, theirs in zip(weights, same, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_a_norm_that_an_adapter_holds_whole_is_trained():
    model = adapted(save_modules=["norm"])
    twin = plain(model)
    assert_same_gradients(gradients(model), gradients(twin))
    assert model.model.norm.weight.requires_grad
    assert model.model.norm.weight.grad.any()
    torch.testing.assert_close(model.model.norm.weight.grad, twin.model.norm.weight.grad, atol=1e-6, rtol=1e-4)
