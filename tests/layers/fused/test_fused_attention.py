"""Attention's own backward in 16 bits: where it is used, where torch's is,
and that both give what the model computes.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable

import pytest
import tiny
import torch
from fused_models import adapted, build, counts, factors, gradients, tokens
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import attention, fused

BF16 = torch.bfloat16


def bf16(kind: str = "Llama", **how) -> nn.Module:
    model = adapted(kind, dtype=BF16, **how)
    assert attention.is_used(model)
    return model


def torchs(model: nn.Module) -> nn.Module:
    """A copy with torch's backward."""
    twin = copy.deepcopy(model)
    attention.leave(twin)
    assert not attention.is_used(twin)
    return twin


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(ours) == list(theirs) != []
    errors = [
        (ours[n].double() - e).square().sum() / e.square().sum()
        for n, e in ((n, t.double()) for n, t in theirs.items())
    ]
    return float(torch.stack(errors).mean()) ** 0.5


def assert_alike(model: nn.Module, twin: nn.Module, **inputs) -> None:
    """The bits of the values; gradients as bf16 has them."""
    ids = tokens()
    with torch.no_grad():
        expected = twin(input_ids=ids, **inputs).logits
    assert torch.equal(model(input_ids=ids, **inputs).logits, expected)
    assert off(gradients(model, **inputs), gradients(twin, **inputs)) < 0.03


KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite", "Phi3", "Olmo2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_in_16_bits_uses_it_and_gradients_are_as_near_to_float64_maths(kind, dtype, calls):
    model, ids = adapted(kind, dtype=dtype), tokens(2, 80)
    assert attention.is_used(model)
    assert counts(calls, lambda: gradients(model, ids))["causal_attention"] == 2
    twin = torchs(model)
    assert counts(calls, lambda: gradients(twin, ids))["causal_attention"] == 0
    exact_model = copy.deepcopy(twin)
    fused.release(exact_model)
    exact = gradients(exact_model.double(), ids)
    ours, theirs = off(gradients(model, ids), exact), off(gradients(twin, ids), exact)
    assert ours < 1.15 * theirs, f"{ours:.4f}, with torch's backward {theirs:.4f}"


def test_in_32_bits_torchs_stays():
    model = adapted()
    assert not attention.is_used(model)
    assert model.config._attn_implementation == "sdpa"
    (row,) = [row for row in fused.report(model) if row.kind == fused.ATTENTION]
    assert "only for 16 bits" in row.why_not


def test_an_adapter_that_is_not_trained_leaves_attention_alone():
    adapter = lk.capture(adapted(dtype=BF16))
    model = lk.attach(build().to(BF16), adapter, trainable=False)
    assert not attention.is_used(model)


@pytest.mark.parametrize("config", [{"attn_implementation": "eager"}], ids=str)
def test_another_implementation_than_sdpa_stays(config, calls):
    model = adapted(dtype=BF16, config=config)
    assert model.config._attn_implementation == "eager"
    assert counts(calls, lambda: gradients(model))["causal_attention"] == 0
    lk.detach(model)
    assert model.config._attn_implementation == "eager"


def test_detach_restores_sdpa_and_bits():
    base = build().to(BF16)
    expected = base(tokens()).logits
    model = lk.attach(base, lk.LoraConfig(rank=2))
    assert attention.is_used(model)
    assert torch.equal(model(tokens()).logits, expected)
    lk.detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens()).logits, expected)


def test_it_stays_as_long_as_any_adapter_does():
    model = bf16()
    lk.attach(model, lk.LoraConfig(rank=2), name="b")
    lk.detach(model, "default")
    assert attention.is_used(model)
    lk.detach(model, "b")
    assert not attention.is_used(model)


# ---- arguments ----


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return mask


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
CASES: dict[str, tuple[Callable[[Tensor], dict], int]] = {
    "padding": (lambda ids: {"attention_mask": padded(ids)}, 0),
    "padding on the left": (lambda ids: {"attention_mask": padded(ids).flip(1)}, 0),
    "a mask of ones": (lambda ids: {"attention_mask": torch.ones_like(ids)}, 2),
    "packed rows": (lambda ids: {"position_ids": PACKED}, 0),
    "positions of each row": (lambda ids: {"position_ids": torch.arange(9) + torch.tensor([[0], [5]])}, 2),
    "a cache": (lambda ids: {"use_cache": True}, 2),
    "not causal": (lambda ids: {"is_causal": False}, 0),
    "attention weights not asked for": (lambda ids: {"output_attentions": False}, 2),
    "hidden states": (lambda ids: {"output_hidden_states": True}, 2),
    "tokens in the batch": (lambda ids: {"num_items_in_batch": torch.tensor(18)}, 2),
    "an argument that nobody knows": (lambda ids: {"softcap_of_mine": 3.0}, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_other_arguments_give_what_torchs_attention_gives(case, kind, calls):
    model, (arguments, used) = bf16(kind), CASES[case]
    inputs = arguments(tokens())
    if case != "a cache":  # which of both it takes with a cache is its own business
        assert counts(calls, lambda: gradients(model, **inputs))["causal_attention"] == used
    assert_alike(model, torchs(model), **inputs)


@pytest.mark.parametrize("case", ["padding", "padding on the left", "packed rows"])
def test_masks_are_kept_to_in_values_and_gradients(case):
    """Against float32, so that a mask that is ignored by both would show."""
    model = bf16()
    inputs = CASES[case][0](tokens())
    wide = torchs(model).float()
    assert off(gradients(model, **inputs), gradients(wide, **inputs)) < 0.1
    assert off(gradients(model), gradients(wide, **inputs)) > 0.2, "the mask matters"


def test_a_sliding_window_is_kept_to(calls):
    for window, used in ((4, 0), (64, 2)):
        model = bf16("Mistral", config={"sliding_window": window})
        assert counts(calls, lambda model=model: gradients(model))["causal_attention"] == used
        assert_alike(model, torchs(model))


def test_some_layers_may_have_a_window(calls):
    types = ["sliding_attention", "full_attention"]
    model = bf16("Qwen3", config={"use_sliding_window": True, "sliding_window": 4, "layer_types": types})
    assert counts(calls, lambda: gradients(model))["causal_attention"] == 1
    assert_alike(model, torchs(model))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_may_share_keys(heads, calls):
    model = bf16(config={"num_key_value_heads": heads})
    assert counts(calls, lambda: gradients(model))["causal_attention"] == 2
    assert_alike(model, torchs(model))


def test_attention_dropout_is_torchs(calls):
    model = bf16(config={"attention_dropout": 0.5})
    assert counts(calls, lambda: gradients(model))["causal_attention"] == 0
    ours, theirs = gradients(model), gradients(torchs(model))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert counts(calls, lambda: gradients(model.eval()))["causal_attention"] == 2


def test_asking_for_attention_weights_gives_what_sdpa_gives():
    model = bf16()
    found, expected = (m(tokens(), output_attentions=True) for m in (model, torchs(model)))
    assert torch.equal(found.logits, expected.logits)
    assert type(found.attentions) is type(expected.attentions)


def test_another_kernel_asked_for_is_used(calls):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = bf16()
    with sdpa_kernel(SDPBackend.MATH):
        assert counts(calls, lambda: gradients(model))["causal_attention"] == 0
    assert counts(calls, lambda: gradients(model))["causal_attention"] == 2


def test_autocast_uses_torchs(calls):
    model, found = bf16(), []
    for one in (model, torchs(model)):
        with torch.autocast("cpu", BF16):
            assert counts(calls, lambda one=one: found.append(gradients(one)))["causal_attention"] == 0
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_torchs(mode, calls):
    model = bf16()
    with mode():
        assert counts(calls, lambda: model(tokens()))["causal_attention"] == 0


def test_generation_with_a_cache_gives_the_same_tokens():
    model = bf16().eval()
    asked = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    ids = tokens()
    for more in ({}, {"attention_mask": padded(ids).flip(1)}):
        assert torch.equal(model.generate(ids, **asked, **more), torchs(model).generate(ids, **asked, **more))


def test_rows_of_one_token_are_torchs(calls):
    model = bf16()
    ids = tokens(2, 1)
    assert counts(calls, lambda: model(ids))["causal_attention"] == 0
    assert torch.equal(model(ids).logits, torchs(model)(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, calls):
    model = bf16(dropout=0.4)
    model.enable_input_require_grads()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert counts(calls, lambda: gradients(model))["causal_attention"] >= 2
    found = gradients(model)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same():
    model = bf16(config={"num_hidden_layers": 1})
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    assert off({n: p.grad for n, p in factors(twin).items()}, gradients(model)) < 0.03
    torch._dynamo.reset()


# ---- configs, copies and files ----


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_use_it_too(way, calls):
    model = bf16()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    found = {}
    assert counts(calls, lambda: found.update(gradients(twin)))["causal_attention"] == 2
    assert all(torch.equal(found[n], g) for n, g in gradients(model).items())
    lk.detach(twin)
    assert (attention.is_used(twin), attention.is_used(model)) == (False, True)


def test_a_pickle_runs_in_a_process_that_has_not_attached_anything(monkeypatch):
    """There the name is not registered yet."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    model = bf16()
    expected, file = model(tokens()).logits, pickle.dumps(model)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, attention.NAME)
    assert torch.equal(pickle.loads(file)(tokens()).logits, expected)


def test_two_models_of_one_config_are_right_and_end_as_they_began():
    import transformers

    first = build().to(BF16)
    second = transformers.LlamaForCausalLM(first.config).to(BF16).train()
    assert first.config is second.config
    base = [m(tokens()).logits for m in (first, second)]
    lk.attach(first, lk.LoraConfig(rank=2))
    assert torch.equal(second(tokens()).logits, base[1])
    lk.attach(second, lk.LoraConfig(rank=2))
    lk.detach(first)
    assert torch.equal(first(tokens()).logits, base[0])
    tiny.randomise_factors(second, size=0.1)
    assert gradients(second)
    lk.detach(second)
    assert first.config._attn_implementation == "sdpa"
    assert torch.equal(second(tokens()).logits, base[1])


def test_a_saved_config_does_not_have_the_name(tmp_path):
    model = bf16()
    model.config.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert attention.NAME not in saved
    assert json.loads(saved)["model_type"] == "llama"
    assert attention.NAME not in model.config.to_json_string(use_diff=False)


def test_merged_weights_saved_by_transformers_load_without_lorakit(tmp_path):
    import transformers

    model = bf16()
    lk.merge(model)
    expected = model(tokens()).logits
    lk.detach(model, merged="keep")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16).to(BF16).train()  # buffers too
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again(tokens()).logits, expected)


def test_models_without_transformers_interface_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4)).to(BF16)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["0"]))
    assert "does not use transformers' attention interface" in attention.why_not(model)
    assert not any(row.kind == fused.ATTENTION for row in fused.report(model))


def test_registering_twice_is_no_error():
    attention.register()
    attention.register()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.forward


def test_an_implementation_set_by_the_user_after_attach_stays():
    model = bf16()
    model.set_attn_implementation("eager")
    assert gradients(model)
    lk.detach(model)
    assert model.config._attn_implementation == "eager"
