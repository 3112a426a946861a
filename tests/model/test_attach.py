"""An adapter on a live model: attach, capture, activate, merge, unmerge, detach, summary."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.model.activate import active, adapters
from lorakit.model.state import base_parameters

LLAMA = lk.LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj", "down_proj"])
MAKERS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "t5": tiny.t5,
    "mlp": tiny.mlp,
    "cnn": tiny.cnn,
}


def value_of(make, config: lk.LoraConfig, seed: int) -> lk.Adapter:
    """A trained adapter for a model of this kind."""
    return lk.capture(tiny.randomise_factors(lk.attach(make(), config), seed))


@pytest.fixture(params=MAKERS)
def any_model(request):
    return MAKERS[request.param]()


# ------------------------------------------------------------------------------------- attach and detach


def test_a_fresh_adapter_leaves_the_output_bit_equal(any_model):
    before = tiny.logits(any_model)
    lk.attach(any_model, lk.LoraConfig(rank=4))
    assert torch.equal(tiny.logits(any_model), before)


def test_no_active_adapter_means_the_bits_of_the_base(any_model):
    before = tiny.logits(any_model)
    tiny.randomise_factors(lk.attach(any_model, lk.LoraConfig(rank=4)))
    assert not torch.allclose(tiny.logits(any_model), before, atol=1e-4)
    lk.activate(any_model, None)
    assert torch.equal(tiny.logits(any_model), before)
    assert active(any_model) == {}


def test_detach_leaves_no_trace(any_model):
    any_model.train()
    parameters = list(any_model.parameters())
    parameters[1].requires_grad_(False)
    parameters[-1].requires_grad_(False)
    next(any_model.children()).eval()
    before, values = tiny.picture(any_model), tiny.bits(any_model)
    lk.attach(any_model, lk.LoraConfig(rank=4, bias="all"))
    lk.attach(any_model, lk.LoraConfig(rank=2, bias="lora_only"), name="b")
    lk.activate(any_model, "default")
    tiny.randomise_factors(any_model)
    assert tiny.picture(any_model) != before
    lk.detach(any_model)
    assert tiny.picture(any_model) == before
    assert tiny.same_bits(tiny.bits(any_model), values)


def test_the_base_keeps_its_names_classes_and_modes(any_model):
    any_model.train()
    before, names = tiny.picture(any_model), [n for n, _ in base_parameters(any_model)]
    lk.attach(any_model, lk.LoraConfig(rank=4))
    after = tiny.picture(any_model)
    assert [k for k in after["keys"] if "lora_" not in k] == before["keys"]
    assert [n for n, _ in base_parameters(any_model)] == names
    for name, cls in before["classes"].items():
        assert issubclass(after["classes"][name], cls)
        assert after["training"][name] == before["training"][name]
    assert {n: i for n, i in after["identity"].items() if "lora_" not in n} == before["identity"]


def test_only_the_adapter_takes_gradients_and_every_factor_gets_one(tiny_llama):
    lk.attach(tiny_llama, LLAMA)
    tiny.randomise_factors(tiny_llama)
    assert all(p.requires_grad == ("lora_" in n) for n, p in tiny_llama.named_parameters())
    tiny_llama(**tiny.example(tiny_llama)).logits.square().sum().backward()
    assert all((p.grad is not None and p.grad.any()) == ("lora_" in n) for n, p in tiny_llama.named_parameters())


def test_an_inference_adapter_freezes_the_base_too_and_detach_gives_the_flags_back(tiny_llama):
    adapter = value_of(tiny.llama, LLAMA, 1)
    next(tiny_llama.parameters()).requires_grad_(False)
    before = tiny.picture(tiny_llama)["gradients"]
    lk.attach(tiny_llama, adapter)
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=1.0)  # what it is given takes no gradient
    bits = tiny.bits(tiny_llama)
    assert not any(tiny.picture(tiny_llama)["gradients"].values())
    lk.attach(tiny_llama, LLAMA, "trained")
    tiny_llama(**tiny.example(tiny_llama)).logits.square().sum().backward()
    optimizer.step()
    assert tiny.same_bits(tiny.bits(tiny_llama), bits)
    lk.activate(tiny_llama, None)
    lk.activate(tiny_llama, "default")
    lk.detach(tiny_llama)
    assert tiny.picture(tiny_llama)["gradients"] == before


def test_attach_can_leave_the_active_adapters_as_they_are(tiny_llama):
    base = tiny.logits(tiny_llama)
    lk.attach(tiny_llama, value_of(tiny.llama, LLAMA, 1), "a", activate=False)
    assert lk.active(tiny_llama) == {}
    assert torch.equal(tiny.logits(tiny_llama), base)
    lk.activate(tiny_llama, {"a": 0.5})
    with_a = tiny.logits(tiny_llama)
    saving = LLAMA.replace(save_modules=["norm"])
    lk.attach(tiny_llama, value_of(tiny.llama, saving, 2), "b", activate=False)
    assert lk.active(tiny_llama) == {"a": 0.5}
    assert torch.equal(tiny.logits(tiny_llama), with_a)
    lk.activate(tiny_llama, "b")
    plain = tiny.llama()
    assert torch.equal(tiny.logits(tiny_llama), tiny.logits(lk.attach(plain, value_of(tiny.llama, saving, 2))))


def test_a_loaded_adapter_can_be_attached_trainable(tiny_llama):
    lk.attach(tiny_llama, value_of(tiny.llama, LLAMA, 1), trainable=True)
    assert {n for n, p in tiny_llama.named_parameters() if p.requires_grad} == {
        n for n, _ in tiny_llama.named_parameters() if "lora_" in n
    }


def test_the_users_config_is_not_changed(tiny_llama):
    config = lk.LoraConfig(rank=4, targets="all-linear", layers=[0], exclude=["o_proj"], rank_pattern={"q_proj": 2})
    before = config.model_copy(deep=True)
    lk.attach(tiny_llama, config)
    assert config == before


def test_attaching_in_eval_or_train_keeps_the_mode_for_the_factors_too(tiny_llama):
    for mode in (True, False):
        model = tiny.llama().train(mode)
        lk.attach(model, LLAMA)
        assert {m.training for m in model.modules()} == {mode}


FAILURES = {
    "misspelt": lk.LoraConfig(targets=["q_proj", "k_porj"]),
    "misspelt save": lk.LoraConfig(targets=["q_proj"], save_modules=["lm_haed"]),
    "norm": lk.LoraConfig(targets=["q_proj", "norm"]),
    "container": lk.LoraConfig(targets=["self_attn"]),
    "layers": lk.LoraConfig(targets=["q_proj"], layers=[0, 7]),
    "rank pattern": lk.LoraConfig(targets=["q_proj"], rank_pattern={"k_proj": 2}),
    "parts": lk.LoraConfig(targets=["q_proj"], packed={"q_proj": [True, False, True]}),
    "norm saved": lk.LoraConfig(targets=["q_proj"], save_modules=["act_fn"]),
}


@pytest.mark.parametrize("config", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("already", [False, True], ids=["alone", "beside another"])
def test_a_failed_attach_leaves_the_model_as_it_was(config, already):
    model = tiny.llama()
    if already:
        lk.attach(model, LLAMA, name="first")
    before, values = tiny.picture(model), tiny.logits(model)
    with pytest.raises(TargetError):
        lk.attach(model, config, name="second")
    assert tiny.picture(model) == before
    assert torch.equal(tiny.logits(model), values)


def test_an_adapter_whose_shapes_do_not_fit_leaves_the_model_as_it_was(tiny_llama):
    adapter = value_of(tiny.llama, LLAMA, 1)
    last = list(adapter.factors)[-1]
    f = adapter.factors[last]
    wrong = lk.Adapter(adapter.config, {**adapter.factors, last: lk.Factors(f.A[:, :-1], f.B, f.alpha)})
    before = tiny.picture(tiny_llama)
    with pytest.raises(AdapterError, match=rf"do not fit '{last}' \(Linear\): A \[4, 23\]"):
        lk.attach(tiny_llama, wrong)
    assert tiny.picture(tiny_llama) == before


def test_an_adapter_with_nan_is_not_attached(tiny_llama):
    adapter = value_of(tiny.llama, LLAMA, 1)
    next(iter(adapter.factors.values())).B[0, 0] = float("nan")
    before = tiny.picture(tiny_llama)
    with pytest.raises(AdapterError, match="not finite"):
        lk.attach(tiny_llama, adapter)
    assert tiny.picture(tiny_llama) == before


# ------------------------------------------------------------------------------------- what else a model does


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(copied, tiny_llama):
    tiny.randomise_factors(lk.attach(tiny_llama, LLAMA))
    before = tiny.logits(tiny_llama)
    twin = copied(tiny_llama)
    assert torch.equal(tiny.logits(twin), before)
    tiny.randomise_factors(twin, 9)
    assert torch.equal(tiny.logits(tiny_llama), before)
    assert type(twin.model.layers[0].self_attn.q_proj) is type(tiny_llama.model.layers[0].self_attn.q_proj)
    lk.detach(twin)
    assert type(twin.model.layers[0].self_attn.q_proj) is nn.Linear
    assert adapters(tiny_llama) == ["default"]


def test_torch_save_of_a_whole_model_comes_back(tiny_gpt2):
    tiny.randomise_factors(lk.attach(tiny_gpt2, lk.LoraConfig(rank=2, packed={"c_attn": [True, False, True]})))
    file = io.BytesIO()
    torch.save(tiny_gpt2, file)
    file.seek(0)
    assert torch.equal(tiny.logits(torch.load(file, weights_only=False)), tiny.logits(tiny_gpt2))


def test_a_base_checkpoint_loads_under_an_attached_adapter(tiny_llama):
    checkpoint = {n: torch.randn_like(t) for n, t in tiny.llama().state_dict().items()}
    lk.attach(tiny_llama, LLAMA)
    result = tiny_llama.load_state_dict(checkpoint, strict=False)
    assert result.unexpected_keys == []
    assert all("lora_" in k for k in result.missing_keys)
    plain = tiny.llama()
    plain.load_state_dict(checkpoint)
    assert torch.equal(tiny.logits(tiny_llama), tiny.logits(plain))


def test_save_pretrained_after_detach_writes_the_same_bytes(tied_llama, tmp_path):
    tied_llama.save_pretrained(tmp_path / "before")
    tiny.randomise_factors(
        lk.attach(tied_llama, lk.LoraConfig(rank=4, targets=["q_proj", "embed_tokens"], save_modules=["norm"]))
    )
    lk.merge(lk.detach(tied_llama) and lk.attach(tied_llama, LLAMA))
    lk.detach(tied_llama, merged="undo")
    tied_llama.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_tied_weights_stay_tied(tied_llama):
    lk.attach(tied_llama, lk.LoraConfig(rank=4, targets=["embed_tokens", "lm_head"]))
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    tied_llama.tie_weights()
    tied_llama.to(torch.float64).to(torch.float32)
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight


def test_generate_uses_the_adapter(tiny_llama):
    prompt = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    before = tiny_llama.generate(**prompt)
    tiny.randomise_factors(lk.attach(tiny_llama, lk.LoraConfig(rank=4)), size=1.0)
    after = tiny_llama.generate(**prompt)
    greedy = prompt["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            greedy = torch.cat([greedy, tiny_llama(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(after, greedy)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("offload", ["cpu_offload", "dispatch"])
def test_a_model_that_accelerate_has_hooked_computes_with_the_adapter(offload, tmp_path):
    import accelerate

    adapter = value_of(tiny.llama, LLAMA, 1)
    expected = tiny.logits(lk.attach(tiny.llama(), adapter))
    model = tiny.llama()
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        places = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "disk",
            "model.layers.1": "cpu",
            "model.norm": "cpu",
            "lm_head": "cpu",
            "model.rotary_emb": "cpu",
        }
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    base = tiny.logits(model)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    lk.attach(model, adapter)
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-6, rtol=0)
    with pytest.raises(StateError, match="offloaded"):
        lk.merge(model)
    lk.detach(model)
    assert torch.equal(tiny.logits(model), base)
    lk.attach(model, LLAMA)
    assert torch.equal(tiny.logits(model), base)
    tiny.randomise_factors(model)
    assert lk.capture(model).rank == 4


def test_an_adapter_with_its_own_head_meets_a_base_whose_head_is_fresh(tiny_bert):
    config = lk.LoraConfig(rank=2, targets=["query", "value"], task="SEQ_CLS")
    adapter = lk.capture(tiny.randomise_factors(lk.attach(tiny_bert, config)))
    other = tiny.bert()
    torch.nn.init.normal_(other.classifier.weight)  # as `from_pretrained` of a base without a head leaves it
    assert torch.equal(tiny.logits(lk.attach(other, adapter)), tiny.logits(tiny_bert))
    third = tiny.bert()
    for parameter in third.bert.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(third, adapter)


@pytest.mark.parametrize("wrong", ["a/path", {"rank": 4}, None])
def test_attach_takes_a_config_or_an_adapter(wrong, tiny_mlp):
    with pytest.raises(AdapterError, match=r"expected a lorakit.LoraConfig, or lorakit.Adapter.load"):
        lk.attach(tiny_mlp, wrong)
