"""`reference`: the base as a model of its own that shares every parameter, whatever is attached to the model."""

from __future__ import annotations

import copy

import made_experts
import packed_checkpoints
import pytest
import quantized
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.bases.load import load_base
from lorakit.errors import StateError
from lorakit.integrations import reference

CASES = {
    "llama": (tiny.llama, lk.LoraConfig(rank=2, dropout=0.5)),
    "saved head and norm": (tiny.llama, lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["lm_head", "norm"])),
    "tied, saved embedding": (
        lambda: tiny.llama(tied=True),
        lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["embed_tokens"]),
    ),
    "tied, trained tokens": (
        lambda: tiny.llama(tied=True),
        lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=[4, 7]),
    ),
    "embedding": (tiny.llama, lk.LoraConfig(rank=2, targets=["embed_tokens", "v_proj"])),
    "dora": (tiny.llama, lk.LoraConfig(rank=2, variant="dora")),
    "lokr": (tiny.llama, lk.LoraConfig(rank=2, variant="lokr")),
    "vera": (tiny.llama, lk.LoraConfig(rank=2, variant="vera")),
    "pissa": (tiny.llama, lk.LoraConfig(rank=2, init="pissa")),
    "prefix": (tiny.llama, lk.LoraConfig(variant="prefix", virtual_tokens=3)),
    "lora with a prompt": (tiny.llama, lk.LoraConfig(rank=2, prompt="prompt", virtual_tokens=3)),
    "biases alone": (tiny.bert, lk.LoraConfig(targets="none", bias="all")),
    "classifier": (tiny.bert, lk.LoraConfig(rank=2, targets=["query"], bias="lora_only", task="SEQ_CLS")),
    "gpt2, packed": (tiny.gpt2, lk.LoraConfig(rank=2, targets=["c_attn"], packed={"c_attn": [True, False, True]})),
    "t5": (tiny.t5, lk.LoraConfig(rank=2, targets=["q", "v"])),
    "mlp": (tiny.mlp, lk.LoraConfig(rank=2)),
    "cnn": (tiny.cnn, lk.LoraConfig(rank=2, targets=["conv1", "conv2", "head"])),
}


@pytest.fixture(params=CASES)
def case(request):
    make, config = CASES[request.param]
    plain = make()
    model = tiny.randomise_factors(lk.attach(make(), config))
    return plain, model, config


def test_it_is_the_base_bit_for_bit_in_its_own_classes_with_the_models_parameters(case):
    plain, model, _ = case
    before = tiny.picture(model.eval())
    trained = tiny.logits(model)
    base = reference(model.train())
    assert torch.equal(tiny.logits(base), tiny.logits(plain))
    assert not torch.equal(trained, tiny.logits(plain))
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: tuple(p.shape) for n, p in base.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.named_parameters()
    }
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in base.parameters())
    assert not any(m.training for m in base.modules())
    assert tiny.picture(model.eval()) == before
    assert torch.equal(tiny.logits(model), trained)


def test_it_stays_the_base_while_adapters_train_come_and_go(case):
    plain, model, config = case
    base, expected = reference(model), tiny.logits(plain)
    tiny.randomise_factors(model, seed=5)
    assert torch.equal(tiny.logits(base), expected)
    lk.attach(model, lk.LoraConfig(rank=3) if config.variant != "vera" else config, "second")
    assert torch.equal(tiny.logits(base), expected)
    lk.detach(model)
    assert torch.equal(tiny.logits(base), expected)
    assert tiny.same_bits(tiny.bits(model), tiny.bits(plain))


def test_a_frozen_adapter_can_be_part_of_it(case):
    _, model, config = case
    value = lk.capture(model)
    lk.attach(lk.detach(model), value, "sft")
    expected = tiny.logits(model.eval())
    lk.attach(model, lk.LoraConfig(rank=3) if config.variant != "vera" else config, "new")
    view = reference(model.train(), active="sft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_new." in name:
                parameter.add_(0.1)
    assert torch.equal(tiny.logits(view), expected)
    assert {id(p) for p in view.parameters()} <= {id(p) for p in model.parameters()}
    assert not any("new" in name for name, _ in view.named_modules())
    with pytest.raises(StateError, match=r"no adapter is attached"):
        lk.merge(view)
    if hasattr(view, "save_pretrained"):
        with pytest.raises(StateError, match=r"lorakit.capture\(model, NAME\)"):
            view.save_pretrained("nowhere")


def test_weights_of_the_adapters_in_it(tiny_llama):
    for seed, name in enumerate(("a", "b"), start=1):
        other = tiny.randomise_factors(lk.attach(tiny.llama(), lk.LoraConfig(rank=2)), seed)
        lk.attach(tiny_llama, lk.capture(other), name)
    lk.activate(tiny_llama, {"a": 0.5, "b": {"model.layers.0": 0.0}})
    expected = tiny.logits(tiny_llama)
    view = reference(tiny_llama, {"a": 0.5, "b": {"model.layers.0": 0.0}})
    lk.activate(tiny_llama, "b")
    assert torch.equal(tiny.logits(view), expected)


def test_experts():
    expected = made_experts.logits(made_experts.moe())
    model = made_experts.randomise(lk.attach(made_experts.moe(), lk.LoraConfig(rank=2, targets=["down_proj"])))
    changed = made_experts.logits(model)
    base = reference(model)
    assert torch.equal(made_experts.logits(base), expected)
    assert not torch.equal(changed, expected)
    frozen = lk.attach(made_experts.moe(), lk.capture(model))
    assert torch.equal(made_experts.logits(reference(frozen, "default")), changed)
    assert torch.equal(made_experts.logits(lk.detach(model)), expected)
    assert torch.equal(made_experts.logits(base), expected)


def _gptq(folder):
    return load_base(packed_checkpoints.save(folder, packed_checkpoints.gptq_config())[0])


QUANTIZED = {
    "nf4": lambda folder: load_base(quantized.save(folder)[0], quantize="nf4"),
    "int8": lambda folder: load_base(quantized.save(folder)[0], quantize="int8"),
    "gptq": _gptq,
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantized_base_is_shared(how, tmp_path):
    model = QUANTIZED[how](tmp_path).eval()
    lk.attach(model, lk.LoraConfig(rank=2))
    lk.activate(model, None)
    expected = tiny.logits(model)
    lk.activate(model, "default")
    tiny.randomise_factors(model)
    base = reference(model.train())
    assert torch.equal(tiny.logits(base), expected)
    tensors = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in (*base.parameters(), *base.buffers())} <= tensors
    lk.detach(model)
    assert torch.equal(tiny.logits(base), expected)


def test_attention_of_torch_and_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=2, targets=["self_attn", "linear1"])))
        base = reference(model)
        assert torch.equal(base(x), expected)
        assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("after", [False, True])
def test_a_forward_that_a_trainer_put_on_the_model_is_not_carried_over(tiny_llama, after):
    pytest.importorskip(
        "trl", minversion="1.16", reason="written for TRL 1.16, whose modules have moved since older releases"
    )
    from trl.trainer.utils import add_fused_lm_head

    expected = tiny.logits(tiny_llama)
    lk.attach(tiny_llama, lk.LoraConfig(rank=2))
    tiny.randomise_factors(tiny_llama)
    if not after:
        base = reference(tiny_llama)
    add_fused_lm_head(tiny_llama)
    if after:
        base = reference(tiny_llama)
    assert torch.equal(tiny.logits(base), expected)
    add_fused_lm_head(base)
    ids = tiny.example(base)["input_ids"]
    with torch.no_grad():
        fused = base(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    plain = expected.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(tiny.logits(base), expected)


def test_hooks_of_accelerate_run_with_the_bases_forward(tiny_llama, tmp_path):
    from accelerate import cpu_offload, dispatch_model

    expected = tiny.logits(tiny_llama)
    dispatched = dispatch_model(tiny_llama, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    tiny.randomise_factors(lk.attach(dispatched, lk.LoraConfig(rank=2)))
    trained = tiny.logits(dispatched)
    assert torch.equal(tiny.logits(reference(dispatched)), expected)
    assert torch.equal(tiny.logits(dispatched), trained)
    offloaded = cpu_offload(tiny.llama(), execution_device="cpu")
    tiny.randomise_factors(lk.attach(offloaded, lk.LoraConfig(rank=2, targets=["q_proj"])))
    trained = tiny.logits(offloaded)
    assert torch.equal(tiny.logits(reference(offloaded)), expected)
    assert torch.equal(tiny.logits(offloaded), trained)
    lk.detach(offloaded)


def test_it_generates_as_the_base_does(tiny_llama):
    ids = tiny.example(tiny_llama)["input_ids"]
    expected = tiny_llama.generate(ids, max_new_tokens=5, do_sample=False)
    tiny.randomise_factors(lk.attach(tiny_llama, lk.LoraConfig(rank=2)))
    assert torch.equal(reference(tiny_llama).generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert not torch.equal(tiny_llama.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_a_copy_and_a_move_of_the_reference_leave_the_model_alone(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2))
    base = reference(tiny_llama)
    twin = copy.deepcopy(base)
    base.to("cpu").requires_grad_(False)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert torch.equal(tiny.logits(base), tiny.logits(tiny.llama()))


def test_what_is_refused(tiny_llama):
    with pytest.raises(StateError, match="no adapter is attached"):
        reference(tiny_llama)
    lk.attach(tiny_llama, lk.LoraConfig(rank=2), "sft")
    with pytest.raises(StateError, match=r"'sft' is trained.*\n.*lorakit.capture\(model, 'sft'\)"):
        reference(tiny_llama, "sft")
    with pytest.raises(StateError, match=r"no adapter named 'stf'.*did you mean 'sft'"):
        reference(tiny_llama, {"stf": 1})
    with pytest.raises(StateError, match="got a int"):
        reference(tiny_llama, 3)
    with lk.route(tiny_llama, ["sft", None]), pytest.raises(StateError, match=r"inside `with lorakit.route"):
        reference(tiny_llama)
    tiny.randomise_factors(tiny_llama)
    lk.merge(tiny_llama)
    with pytest.raises(StateError, match=r"'sft' is merged.*\n.*unmerge"):
        reference(tiny_llama)
