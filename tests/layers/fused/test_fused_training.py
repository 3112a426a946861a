"""Models with fused modules: the base's bits, the plain path's gradients, PEFT's gradients, and everything back as it
was on detach.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tiny
import torch
from fused_models import (
    ALL,
    KINDS,
    PACKED,
    adapted,
    assert_same_gradients,
    build,
    counts,
    factors,
    gradients,
    kinds,
    plain,
    tokens,
)

import lorakit as lk

MODELS = pytest.mark.parametrize("kind", KINDS)


@MODELS
def test_attach_fuses_what_it_knows_and_training_uses_it(kind, calls):
    model = adapted(kind)
    after = ["post_attention_layernorm", "post_feedforward_layernorm"]  # Olmo 2
    expected = {"model.norm": "FusedRmsNorm"}
    for i in range(2):
        expected[f"model.layers.{i}.mlp"] = "FusedGatedMlp"
        expected |= {
            f"model.layers.{i}.{n}": "FusedRmsNorm"
            for n in (after if kind == "Olmo2" else ["input_layernorm", after[0]])
        }
        if kind in ("Qwen3", "Olmo2"):
            expected |= {f"model.layers.{i}.self_attn.{n}": "FusedRmsNorm" for n in ("q_norm", "k_norm")}
    assert kinds(model) == expected
    done = counts(calls, lambda: gradients(model))
    # The first norm's input takes no gradient, but for Olmo 2 that has none there.
    norms = sum(k == "FusedRmsNorm" for k in expected.values()) - (kind != "Olmo2")
    linears = 2 * (2 if kind == "Phi3" else 4)
    assert done == {"gated_mlp": 2, "causal_attention": 0, "project": linears, "rms_norm": norms}


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_leaves_every_bit_of_the_logits(kind, dtype):
    base, model = build(kind).to(dtype), adapted(kind, trained=False, dtype=dtype, dropout=0.2)
    for ids in (tokens(), tokens(1, 70), tokens(1, 1)):
        with torch.no_grad():
            expected = base(ids).logits
        for train in (True, False):
            model.train(train)
            assert torch.equal(model(ids).logits, expected)
            with torch.no_grad():
                assert torch.equal(model(ids).logits, expected)


@MODELS
def test_with_no_adapter_active_every_bit_is_the_bases(kind):
    base, model = build(kind)(tokens()).logits, adapted(kind)
    assert not torch.equal(model(tokens()).logits, base)
    lk.activate(model, None)
    assert torch.equal(model(tokens()).logits, base)


@MODELS
def test_values_are_those_of_the_plain_path(kind):
    model = adapted(kind)
    for ids in (tokens(), tokens(1, 70)):
        torch.testing.assert_close(model(ids).logits, plain(model)(ids).logits, atol=1e-4, rtol=1e-5)


@MODELS
def test_gradients_are_those_of_the_plain_path(kind):
    model = adapted(kind)
    assert_same_gradients(gradients(model), gradients(plain(model)))


@MODELS
def test_the_inputs_gradient_is_that_of_the_plain_path(kind):
    model, found = adapted(kind), []
    embeddings = model.get_input_embeddings()(tokens()).detach()
    for one in (model, plain(model)):
        x = embeddings.clone().requires_grad_()
        found += torch.autograd.grad(one(inputs_embeds=x).logits.square().mean(), x)
    assert (found[0] - found[1]).norm() / found[1].norm() < 2e-5


@MODELS
def test_bf16_gradients_are_as_near_to_float64_maths_as_those_of_the_plain_path(kind):
    model, ids = adapted(kind, dtype=torch.bfloat16), tokens(2, 80)
    exact = gradients(plain(model).double(), ids)

    def error(found) -> float:
        off = sum((found[n].double() - e).square().sum() / e.square().sum() for n, e in exact.items())
        return float(off / len(exact)) ** 0.5

    ours, theirs = error(gradients(model, ids)), error(gradients(plain(model), ids))
    assert {g.dtype for g in gradients(model, ids).values()} == {torch.float32}
    assert ours < 1.1 * theirs, f"{ours:.4f}, of the plain path {theirs:.4f}"


@MODELS
def test_gradients_are_pefts(kind):
    import peft

    model = adapted(kind, alpha=8)
    theirs = peft.get_peft_model(
        build(kind),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=PACKED if kind == "Phi3" else ALL, task_type="CAUSAL_LM"),
    )
    named = dict(theirs.named_parameters())

    def parameter(name: str) -> torch.nn.Parameter:
        module, _, letter = name.rpartition(".lora_default.")
        return named[f"base_model.model.{module}.lora_{letter}.default.weight"]

    with torch.no_grad():
        for name, value in factors(model).items():
            parameter(name).copy_(value)
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    theirs(input_ids=ids, labels=ids).loss.backward()
    ours = gradients(model)
    assert_same_gradients(ours, {n: parameter(n).grad for n in ours})


@MODELS
def test_detach_gives_every_class_back_as_often_as_it_is_done(kind):
    model = build(kind)
    before, bits = tiny.picture(model), tiny.bits(model)
    for _ in range(2):
        lk.attach(model, lk.LoraConfig(rank=2, targets=PACKED if kind == "Phi3" else ALL))
        assert kinds(model)
        assert list(tiny.bits(model)) == list(bits), "names of the base's weights"
        gradients(model)
        model.zero_grad()
        lk.detach(model)
        assert tiny.picture(model) == before
        assert tiny.same_bits(tiny.bits(model), bits)


def test_modules_stay_fused_as_long_as_any_adapter_is_there():
    model = adapted()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"]), name="b")
    before = kinds(model)
    lk.detach(model, "default")
    assert kinds(model) == before
    lk.activate(model, "b")
    assert_same_gradients(
        {n: g for n, g in gradients(tiny.randomise_factors(model)).items() if g.any()}, gradients(plain(model))
    )
    lk.detach(model, "b")
    assert kinds(model) == {}


def test_a_fused_module_is_still_of_its_own_class():
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    layer = adapted().model.layers[0]
    assert isinstance(layer.mlp, LlamaMLP)
    assert isinstance(layer.input_layernorm, LlamaRMSNorm)
    assert type(layer.mlp) is type(adapted().model.layers[1].mlp)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_train_the_same(way, calls):
    model = adapted("Qwen3")
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert kinds(twin) == kinds(model)
    ours, theirs = {}, gradients(model)
    assert counts(calls, lambda: ours.update(gradients(twin)))["gated_mlp"] == 2
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    lk.detach(twin)
    assert kinds(twin) == {}
    assert kinds(model)


def test_an_adapter_saved_from_a_fused_model_attaches_to_a_plain_one(tmp_path):
    model = adapted("Qwen2")
    lk.capture(model).save(tmp_path)
    again = lk.attach(build("Qwen2"), lk.Adapter.load(tmp_path)).eval()
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
        assert torch.equal(again(tokens()).logits, expected)
    lk.merge(again)
    torch.testing.assert_close(again(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    lk.unmerge(again)
    torch.testing.assert_close(again(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


SUBSETS = [
    ["q_proj"],
    ["k_proj", "v_proj"],
    ["o_proj"],
    ["gate_proj"],
    ["up_proj", "q_proj"],
    ["down_proj"],
    ["gate_proj", "down_proj", "v_proj"],
]


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_any_of_a_models_linears_may_be_targeted(kind, targets, calls):
    model = adapted(kind, targets=targets)
    done = counts(calls, lambda: gradients(model))
    assert_same_gradients(gradients(model), gradients(plain(model)))
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert (done["gated_mlp"], done["project"]) == (2 * bool(mlp & {*targets}), 2 * len({*targets} - mlp))


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_dropout_is_the_plain_paths_whatever_is_targeted(targets):
    model = adapted(targets=targets, dropout=0.4)
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_layers_without_an_adapter_pass_gradients_on(calls):
    model = adapted(layers=[0])
    assert set(kinds(model)) >= {"model.layers.0.mlp", "model.layers.1.input_layernorm"}
    assert "model.layers.1.mlp" not in kinds(model)
    assert counts(calls, lambda: gradients(model))["gated_mlp"] == 1
    assert_same_gradients(gradients(model), gradients(plain(model)))


@pytest.mark.parametrize("size", [2, 24, 264])
def test_heads_may_be_of_any_even_size(size):
    base, model = build(head_dim=size), adapted(trained=False, config={"head_dim": size})
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    tiny.randomise_factors(model, size=0.1)
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_no_rows_are_no_error():
    layer = adapted("Qwen3", dropout=0.1).model.layers[0]
    for shape in ((0, 9, 32), (2, 0, 32)):
        x = torch.empty(shape, requires_grad=True)
        y = layer.mlp(layer.input_layernorm(x))
        assert y.shape == shape
        y.sum().backward()
    assert all(not p.grad.any() for p in factors(layer.mlp).values())


def test_ranks_and_scales_may_differ_between_linears():
    model = adapted(
        rank_pattern={"q_proj": 1, "v_proj": 5, "up_proj": 2, "down_proj": 7},
        alpha_pattern={"v_proj": 3, "gate_proj": 5},
        rslora=True,
    )
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_biases_of_linears_are_added():
    model = adapted("Llama", config={"attention_bias": True, "mlp_bias": True}, trained=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.normal_()
    tiny.randomise_factors(model, size=0.1)
    assert_same_gradients(gradients(model), gradients(plain(model)))
    torch.testing.assert_close(model(tokens()).logits, plain(model)(tokens()).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_may_share_keys(heads):
    model = adapted(config={"num_key_value_heads": heads})
    assert_same_gradients(gradients(model), gradients(plain(model)))


def test_less_is_kept_for_backward_than_by_the_plain_path():
    from lorakit.bench.measure import kept_bytes

    ids = tokens(2, 64)

    def kept(dtype) -> tuple[int, int]:
        model = adapted("Qwen3", dropout=0.1, dtype=dtype)
        return kept_bytes(model, lambda: model(ids).logits.sum()), kept_bytes(
            twin := plain(model), lambda: twin(ids).logits.sum()
        )

    ours, theirs = kept(torch.float32)
    assert theirs - ours == 2 * 2 * (128 * 40 * 4), "act(gate) and act(gate) · up of two layers"
    ours, theirs = kept(torch.bfloat16)
    assert ours < 0.7 * theirs, "and the norms' float32 copies"
