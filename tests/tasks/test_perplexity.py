"""The loss over trained positions, against a plain computation of the whole logits."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from lorakit.errors import ConfigError, DataError, LorakitError
from lorakit.tasks.text import causal_loss
from lorakit.tasks.text.perplexity import Loss, perplexity


@pytest.fixture
def items(make_item):
    pairs = [
        ("a", "b"),
        ("what is it?", " a longer answer than the others"),
        ("two", " words"),
        ("", "no prompt at all"),
    ]
    return [make_item(prompt, answer, number) for number, (prompt, answer) in enumerate(pairs, start=1)]


def by_hand(model, items) -> tuple[float, int]:
    """Row by row, all logits, float64: the sum over trained tokens and their number."""
    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for item in items:
            logs = model(torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
            for at in range(1, len(item.ids)):
                if item.trained[at]:
                    total -= float(logs[at - 1, item.ids[at]])
                    tokens += 1
    return total, tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_is_the_mean_over_trained_tokens_of_all_rows(family, request, items, batch_size):
    model = request.getfixturevalue(family)
    total, tokens = by_hand(model, items)
    loss = perplexity(model, items, pad_id=0, batch_size=batch_size)
    assert loss.loss == pytest.approx(total / tokens, abs=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (loss.tokens, loss.rows) == (tokens, len(items))


def test_pad_may_be_the_end_token(llama, items):
    assert perplexity(llama, items, pad_id=1).loss == pytest.approx(perplexity(llama, items, pad_id=0).loss, abs=1e-6)


def test_untrained_positions_do_not_count(llama, make_item):
    item = make_item("prompt", "answer")
    only_last = dataclasses.replace(item, trained=[False] * (len(item.ids) - 1) + [True])
    total, tokens = by_hand(llama, [only_last])
    assert tokens == 1
    assert perplexity(llama, [only_last], 0).loss == pytest.approx(total, abs=1e-5)


def test_logits_are_made_only_of_trained_positions(llama, make_item, monkeypatch):
    monkeypatch.setattr(causal_loss, "POSITIONS_MULTIPLE", 1)
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    perplexity(llama, [make_item("a prompt of thirty characters!", "yes")], 0)
    hook.remove()
    assert seen == [len("yes") + 1]  # and the end token


def test_half_precision_logits_are_summed_in_float32(llama, items):
    exact = perplexity(llama, items, 0).loss
    assert perplexity(llama.bfloat16(), items, 0).loss == pytest.approx(exact, rel=0.03)


def test_the_model_is_in_evaluation_mode_and_restored(gpt2, items):
    gpt2.train()
    assert perplexity(gpt2, items, 0) == perplexity(gpt2, items, 0)
    assert gpt2.training
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_progress_counts_every_row_once(llama, items):
    done = []
    perplexity(llama, items, 0, batch_size=3, on_batch=done.append)
    assert done == [3, 1]


def test_a_non_finite_loss_names_the_row(llama, items):
    with torch.no_grad():
        llama.model.embed_tokens.weight[items[2].ids[1]] = torch.nan  # "w", which only row 3 and row 2 have
    with pytest.raises(LorakitError, match=r"rows\.jsonl, row [23]: the loss is nan"):
        perplexity(llama, items, 0, batch_size=16)
    assert math.isfinite(perplexity(llama, [items[0]], 0).loss)


def test_a_row_with_nothing_to_predict_is_named(llama, make_item):
    item = make_item("prompt", "answer", number=7)
    untrained = dataclasses.replace(item, trained=[True] + [False] * (len(item.ids) - 1))
    with pytest.raises(DataError, match=r"row 7: no trained token after the first"):
        perplexity(llama, [untrained], 0)


def test_a_row_longer_than_the_models_positions_is_named(gpt2, make_item):
    with pytest.raises(DataError, match=r"row 9: 71 tokens, but the model has 64 positions"):
        perplexity(gpt2, [make_item("a" * 60, "b" * 10, number=9)], 0)


def test_no_rows_an_encoder_decoder_or_a_batch_of_none_are_refused(llama, t5, items):
    with pytest.raises(DataError, match="no rows"):
        perplexity(llama, [], 0)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        perplexity(t5, items, 0)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        perplexity(llama, items, 0, batch_size=0)


def test_an_infinite_perplexity_is_valid_json():
    assert json.loads(json.dumps(Loss(800.0, math.inf, 3, 1).to_dict(), allow_nan=False))["perplexity"] is None
