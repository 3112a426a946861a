"""Trained tokens in PEFT's folder, both ways with the real peft: logits, gradients, tied embeddings, merging."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.adapter.tokens import Tokens
from lorakit.errors import AdapterError
from lorakit.io.tensors import read_tensors, write_tensors

IDS = [5, 2, 17]


def build(kind: str):
    if kind == "gemma":
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=tiny.VOCAB,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        ).eval()
    return {"untied": tiny.llama, "tied": lambda: tiny.llama(tied=True), "gpt2": tiny.gpt2}[kind]().eval()


KINDS = ["untied", "tied", "gpt2", "gemma"]  # gpt2 and gemma are tied; gemma multiplies its embedding's output


def linears(kind: str) -> list[str]:
    return ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]


def ids() -> torch.Tensor:
    return torch.tensor([[5, 1, 2, 17, 9, 5], [3, 4, 17, 17, 2, 8]])


def theirs(kind: str, **settings):
    config = {"r": 2, "target_modules": linears(kind), "init_lora_weights": False, "trainable_token_indices": IDS}
    torch.manual_seed(3)
    model = peft.get_peft_model(build(kind), peft.LoraConfig(**config | {"task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return model.eval()


def gradients(model, of: str) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    return [p.grad for n, p in model.named_parameters() if of in n and p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_pefts_computes_the_same_here(kind, tmp_path):
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    ours = lk.attach(build(kind), adapter, trainable=True)
    (module,) = [m for m, u in adapter.updates.items() if isinstance(u, Tokens)]
    assert adapter.updates[module].ids == (2, 5, 17)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    (found,), (expected,) = gradients(ours, "default.weight"), gradients(model, "trainable_tokens_delta")
    order = sorted(range(3), key=lambda i: IDS[i])
    torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_here_computes_the_same_in_peft(kind, tmp_path):
    model = build(kind)
    before = model(ids()).logits
    lk.attach(model, lk.LoraConfig(rank=2, targets=linears(kind), trainable_tokens=IDS, task="CAUSAL_LM"))
    assert torch.equal(model(ids()).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    lk.capture(model).save(tmp_path)
    with torch.no_grad():
        expected = model(ids()).logits
        found = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()(ids()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 0.05
    # and merged here: the same logits, tied weights still tied, every bit back
    weight = model.get_input_embeddings().weight
    bits = weight.detach().clone()
    lk.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-4)
    assert (model.get_output_embeddings().weight is weight) == (kind != "untied")
    assert not torch.equal(weight, bits)
    lk.unmerge(model)
    assert torch.equal(weight, bits)
    lk.detach(model)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_what_is_read_is_written_back(kind, tmp_path):
    theirs(kind).save_pretrained(tmp_path / "theirs")
    lk.Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    with torch.no_grad():
        a, b = (peft.PeftModel.from_pretrained(build(kind), tmp_path / n)(ids()).logits for n in ("theirs", "ours"))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_an_output_layer_of_its_own_has_tokens_of_its_own(tmp_path):
    model = theirs("untied", trainable_token_indices={"embed_tokens": [2, 5], "lm_head": [1, 2]})
    model.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert {m: u.ids for m, u in adapter.updates.items() if isinstance(u, Tokens)} == {
        "model.embed_tokens": (2, 5),
        "lm_head": (1, 2),
    }
    ours = lk.attach(build("untied"), adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
        lk.capture(ours).save(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(build("untied"), tmp_path / "ours").eval()
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_tokens_alone_goes_both_ways(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=IDS, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("untied"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert adapter.updates.keys() == {"model.embed_tokens"}
    ours = lk.attach(build("untied"), adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
        lk.capture(ours).save(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(build("untied"), tmp_path / "ours").eval()
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)


def test_rows_and_indices_that_do_not_fit_are_an_error_that_names_the_key(tmp_path):
    theirs("untied").save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    for indices, said in (
        ([1, 2], r"has shape \[3, \d+\], and its config names 2 tokens"),
        ([1, 1, 2], "names a token twice"),
        ({"wte": [1, 2, 3]}, "does not name their indices"),
        (None, "does not name their indices"),
    ):
        config.write_text(json.dumps(values | {"trainable_token_indices": indices}))
        with pytest.raises(AdapterError, match=said):
            lk.Adapter.load(tmp_path)
    config.write_text(json.dumps(values))
    tensors, header = read_tensors(file)
    write_tensors(file, {k: t for k, t in tensors.items() if "tokens_delta" not in k}, header)
    with pytest.raises(AdapterError, match="their rows are missing"):
        lk.Adapter.load(tmp_path)


def test_other_formats_say_that_they_cannot_hold_them(tmp_path):
    adapter = lk.capture(lk.attach(build("untied"), lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=[1, 2])))
    with pytest.raises(AdapterError, match=r"trained tokens of model\.embed_tokens"):
        adapter.save(tmp_path / "mlx", "mlx")


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_an_adapter_of_pefts_on_a_resized_base_keeps_its_tying(kind, tmp_path):
    """With a resized base PEFT also writes frozen weights, and of tied embeddings the same rows twice."""
    build(kind).save_pretrained(tmp_path / "base")

    def resized():
        model = type(build(kind)).from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model.resize_token_embeddings(tiny.VOCAB + 3)
        return model.eval()

    new = [tiny.VOCAB, tiny.VOCAB + 2]
    model = peft.get_peft_model(
        resized(), peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=new, task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "theirs")
    ours = lk.attach(resized(), lk.Adapter.load(tmp_path / "theirs"), trainable=True)
    batch = torch.tensor([[new[0], 3, new[1], 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-4)
    trained = [name for name, p in ours.named_parameters() if p.requires_grad and p.shape[0] == 2 and "embed" in name]
    assert len(trained) == 1
    assert not any("lm_head.lora_default" in name for name, _ in ours.named_parameters())
    if kind == "tied":
        lk.merge(ours)
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_naming_both_ends_of_a_tied_weight_trains_one_set_of_rows():
    both = {"lm_head": [1, 2], "embed_tokens": [1, 2]}
    model = lk.attach(build("tied"), lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=both))
    assert [m for m, u in lk.capture(model).updates.items() if isinstance(u, Tokens)] == ["model.embed_tokens"]
