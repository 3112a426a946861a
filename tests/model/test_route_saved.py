"""Rows of one batch with weights of their own: classifiers with their heads, norms, biases, whole embeddings."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import StateError

HEADS = lk.LoraConfig(rank=2, targets=["query", "dense"], save_modules=["classifier"], task="SEQ_CLS")
CASES = {
    "heads": (tiny.bert, HEADS),
    "heads and norms": (tiny.bert, HEADS.replace(save_modules=["classifier", "LayerNorm"])),
    "biases beside updates": (tiny.bert, lk.LoraConfig(rank=2, targets=["query", "dense"], bias="all")),
    "a tied embedding": (
        lambda: tiny.llama(tied=True),
        lk.LoraConfig(rank=2, targets=["q_proj", "gate_proj"], save_modules=["embed_tokens"]),
    ),
    "norms": (tiny.llama, lk.LoraConfig(rank=2, targets=["q_proj", "gate_proj"], save_modules=["norm", "lm_head"])),
    "positions": (tiny.gpt2, lk.LoraConfig(rank=2, targets=["c_attn"], save_modules=["wpe"])),
    "LoHa": (tiny.bert, HEADS.replace(variant="loha", targets=["query"])),
}
ROWS = ["a", None, "b", "a", "plain", {"plain": 0.5, "b": 1.0}]


def three(make, config):
    """Adapters a and b with whole weights, and plain without."""
    model = make()
    for seed, name in enumerate("ab"):
        tiny.randomise_factors(lk.attach(model, config, name), seed)
    plain = lk.LoraConfig(rank=3, targets=config.targets)
    return tiny.randomise_factors(lk.attach(model, plain, "plain"), 5).eval()


def ids(rows: int):
    return torch.randint(3, tiny.VOCAB, (rows, 7), generator=torch.Generator().manual_seed(3))


def row_by_row(model, rows, inputs):
    out = []
    for which, row in zip(rows, inputs, strict=True):
        lk.activate(model, which)
        out.append(model(input_ids=row[None]).logits)
    return torch.cat(out)


@pytest.mark.parametrize("case", CASES)
def test_each_row_uses_its_own_adapters_weights(case):
    model, inputs = three(*CASES[case]), ids(len(ROWS))
    with torch.no_grad():
        expected = row_by_row(model, ROWS, inputs)
        lk.activate(model, "b")
        with lk.route(model, ROWS):
            found = model(input_ids=inputs).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[0], found[1])
        assert torch.equal(model(input_ids=inputs[:1]).logits, row_by_row(model, ["b"], inputs[:1]))


@pytest.mark.parametrize("case", ["heads and norms", "biases beside updates", "a tied embedding", "norms"])
def test_gradients_are_those_of_each_adapter_alone(case):
    rows, inputs = ["a", "b", "a", "b"], ids(4)
    model, alone = three(*CASES[case]), three(*CASES[case])
    with lk.route(model, rows):
        model(input_ids=inputs).logits.square().sum().backward()
    row_by_row(alone, rows, inputs).square().sum().backward()
    expected = {id(p): n for n, p in alone.named_parameters()}
    found = dict(model.named_parameters())
    lk.activate(model, "b")
    lk.activate(alone, "b")
    compared = 0
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad and id(parameter) in expected:
            ours = dict(model.named_parameters())[name]
            assert (ours.grad is None) == (parameter.grad is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
                compared += "saved" in name or "lora_" not in name
    assert compared
    assert found


def test_peft_gives_the_same_for_a_batch_of_classifiers(tmp_path):
    model, rows, inputs = three(*CASES["heads"]), ["a", "b", "b", "a"], ids(4)
    for name in "ab":
        lk.capture(model, name).save(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.eval()
    with torch.no_grad(), lk.route(model, rows):
        ours = model(input_ids=inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(input_ids=inputs, adapter_names=rows).logits, atol=1e-5, rtol=1e-5)


def test_tokens_of_a_packed_batch_use_their_own_weights():
    model = three(*CASES["norms"])
    rows, inputs = ["a", None, "b"], ids(3)
    with torch.no_grad():
        expected = row_by_row(model, rows, inputs)
        choices = [which for which in rows for _ in range(7)]
        mask = torch.block_diag(*[torch.ones(7, 7).tril() for _ in rows]).bool()[None, None]
        positions = torch.arange(7).repeat(3)[None]
        with lk.route(model, choices, per="token"):
            found = model(
                input_ids=inputs.reshape(1, -1),
                attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
                position_ids=positions,
            ).logits
    torch.testing.assert_close(found.view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_generation_with_heads_of_their_own_is_each_adapters():
    model = three(*CASES["norms"])
    rows, inputs = ["a", None, "b"], ids(3)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = []
    for which, row in zip(rows, inputs, strict=True):
        lk.activate(model, which)
        expected.append(model.generate(row[None], **settings)[0])
    with lk.route(model, rows):
        assert torch.equal(model.generate(inputs, **settings), torch.stack(expected))
    with lk.route(model, rows, repeat=2):
        twice = model.generate(inputs, num_return_sequences=2, num_beams=2, max_new_tokens=3, eos_token_id=None)
    assert len(twice) == 6


def test_afterwards_and_after_an_error_everything_is_as_before():
    model = three(*CASES["heads"])
    lk.activate(model, "a")
    before, logits = tiny.picture(model), tiny.logits(model)
    with pytest.raises(StateError, match="given 3 rows"), lk.route(model, ["a", "b"]):
        model(input_ids=ids(3))
    with (
        pytest.raises(StateError, match=r"replaces weights of the base \(classifier.*and so does 'b' \(row 0\)"),
        lk.route(model, [{"a": 1.0, "b": 1.0}]),
    ):
        pass
    assert tiny.picture(model) == before
    assert torch.equal(tiny.logits(model), logits)


def test_a_module_that_sees_no_rows_is_an_error_that_names_it():
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lin(x).flatten(0, 1)[:-1])

    model = Pooled()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin"], save_modules=["head"]), "a")
    with (
        pytest.raises(StateError, match=r"'head' was given \[5, 4\] inside lorakit.route"),
        lk.route(model, ["a", None]),
    ):
        model(torch.randn(2, 3, 4))
