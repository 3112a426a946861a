"""How the next token of each row is picked: beside transformers' logits processors, float64 maths and counted draws."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorakit.serve.embedded import truncation
from lorakit.serve.embedded.picking import Picking, pick
from lorakit.serve.engine import Sampling

VOCAB = 300

# One of each kind, to be mixed in a batch.
KINDS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "warm": {"temperature": 1.7},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 7},
    "min_p": {"min_p": 0.2},
    "all truncations": {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"presence": 0.7, "frequency": 0.4, "repetition": 1.3},
    "greedy penalties": {"temperature": 0.0, "frequency": 2.0},
    "bias": {"logit_bias": ((3, 4.0), (9, -100.0))},
    "logprobs": {"logprobs": 3},
}


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def picking(prompt=(5, 6, 7), **settings) -> Picking:
    return Picking(Sampling(**{"max_tokens": 1000, **settings}), prompt, None, "cpu")


def answers(settings: list[dict], steps: int = 12) -> list[list]:
    """The tokens picked for each row, each row with logits of its own that change with the step."""
    rows = [picking(**one) for one in settings]
    out: list[list] = [[] for _ in rows]
    for step in range(steps):
        logits = torch.cat([logits_of(1, seed=100 * one["seed"] + step) for one in settings])
        for row, picked in zip(out, pick(logits, rows), strict=True):
            row.append(picked)
    return out


# ------------------------------------------------------------------------------------------------------- greedy


def test_greedy_rows_pick_the_largest_logit():
    logits = logits_of(6)
    before = logits.clone()
    picked = pick(logits, [picking(temperature=0.0) for _ in range(6)])
    assert [one.id for one in picked] == logits.argmax(-1).tolist()
    assert all(one.finish is None and one.error is None and one.logprob is None for one in picked)
    torch.testing.assert_close(logits, before, atol=0, rtol=0)


def test_rows_among_others_are_picked_as_alone():
    settings = [{**kind, "seed": at} for at, kind in enumerate(KINDS.values())]
    together = answers(settings)
    for one, row in zip(settings, together, strict=True):
        assert answers([one])[0] == row, one
    assert answers(settings[::-1])[::-1] == together


# ---------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, lambda: [TemperatureLogitsWarper(0.7)]),
        ({"top_p": 0.9}, lambda: [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.05}, lambda: [TopPLogitsWarper(0.05)]),
        ({"top_k": 5}, lambda: [TopKLogitsWarper(5)]),
        ({"top_k": 10**6}, list),
        ({"min_p": 0.1}, lambda: [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.4, "min_p": 0.02, "top_k": 60, "top_p": 0.7},
            lambda: [TemperatureLogitsWarper(1.4), MinPLogitsWarper(0.02), TopKLogitsWarper(60), TopPLogitsWarper(0.7)],
        ),
    ],
    ids=["temperature", "top_p", "small top_p", "top_k", "large top_k", "min_p", "all"],
)
def test_probabilities_are_those_of_transformers(settings, warpers, vocab, spread):
    logits = logits_of(5, vocab, spread=spread)
    expected = logits
    for warper in warpers():
        expected = warper(torch.zeros(5, 0, dtype=torch.long), expected)
    sampling = Sampling(max_tokens=1, **settings)
    scaled = logits / sampling.temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    kept = truncation.keep_likely(weights.clone(), [sampling] * 5)
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), expected.softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.0, 0.001, 0.3, 0.9, 0.999999])
def test_both_ways_to_a_nucleus_keep_the_same_tokens(top_p):
    weights = torch.cat([logits_of(3, 2000, spread=spread).softmax(-1) for spread in (0.01, 1.0, 5.0)])
    weights /= weights.amax(-1, keepdim=True)
    by_sort = truncation.nucleus_by_sort(weights.clone(), [top_p] * 9)
    quick = truncation.nucleus(weights.clone(), [top_p] * 9)
    differ = (by_sort > 0) != (quick > 0)  # float32 sums tell no less apart than some 1e-7 of the total
    assert ((weights * differ).sum(-1) <= 1e-6 * weights.sum(-1)).all()
    assert (quick > 0).any(-1).all()


def test_of_equally_likely_tokens_a_nucleus_keeps_no_more_than_it_needs():
    weights = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.25]])  # 3.25 in all
    for way in (truncation.nucleus, truncation.nucleus_by_sort):
        assert way(weights.clone(), [0.6]).tolist() == [[1.0, 0.5, 0.5, 0, 0, 0]]  # 1.95 is in the third token


def test_truncation_of_some_rows_leaves_the_others():
    weights = logits_of(3).softmax(-1)
    weights /= weights.amax(-1, keepdim=True)
    settings = [Sampling(1), Sampling(1, top_k=4), Sampling(1, top_p=0.5, min_p=0.1)]
    kept = truncation.keep_likely(weights.clone(), settings)
    torch.testing.assert_close(kept[0], weights[0], atol=0, rtol=0)
    assert int((kept[1] > 0).sum()) == 4
    torch.testing.assert_close(kept[2:], truncation.keep_likely(weights[2:].clone(), settings[2:]), atol=0, rtol=0)


# -------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.5}])
def test_tokens_are_drawn_as_often_as_they_are_likely(settings):
    draws = 6000
    logits = logits_of(1, 12, spread=1.5)
    sampling = Sampling(max_tokens=1, **settings)
    weights = ((logits - logits.max()) / sampling.temperature).exp()
    kept = truncation.keep_likely(weights, [sampling])[0].double()
    expected = (kept / kept.sum()).tolist()
    rows = [picking(seed=seed, **settings) for seed in range(draws)]
    counts = Counter(one.id for one in pick(logits.expand(draws, -1), rows))
    for token, likely in enumerate(expected):
        assert abs(counts[token] - draws * likely) <= 4.5 * math.sqrt(draws * likely * (1 - likely)), token


def test_a_seed_repeats_an_answer_and_other_seeds_do_not():
    first, again, other, negative = (_drawn(seed) for seed in (3, 3, 4, -3))
    assert first == again
    assert first not in (other, negative)


def test_without_a_seed_answers_differ():
    assert _drawn(None) != _drawn(None)


def _drawn(seed: int | None) -> list:
    row = picking(seed=seed)
    return [pick(logits_of(1, seed=step, spread=1.0), [row])[0] for step in range(20)]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-5])
def test_the_lowest_temperatures_are_greedy(temperature):
    logits = logits_of(4) * 1000
    picked = pick(logits, [picking(temperature=temperature, seed=at) for at in range(4)])
    assert [one.id for one in picked] == logits.argmax(-1).tolist()


def test_the_ends_of_the_random_numbers_are_tokens_that_may_be_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]] * 2)
    low, high = picking(), picking()
    low.uniform = lambda: 0.0
    high.uniform = lambda: 1 - 2**-24
    assert [one.id for one in pick(logits, [low, high])] == [1, 3]


# ------------------------------------------------------------------------------------------- bias and penalties


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer():
    prompt = [1, 2, 3, 2]
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    row = picking(prompt, temperature=0.0, repetition=1.8)
    so_far = list(prompt)
    for step in range(150):
        logits = logits_of(1, 60, seed=step)
        expected = int(processor(torch.tensor([so_far]), logits.clone()).argmax())
        assert pick(logits, [row])[0].id == expected
        so_far.append(expected)


def test_presence_and_frequency_are_subtracted_from_tokens_of_the_answer_only():
    row = picking((0, 0, 0), temperature=0.0, presence=0.5, frequency=0.25)
    logits = torch.tensor([[2.0, 1.9, 0.95]])
    # Picked once a token costs 0.75, twice 1.0, thrice 1.25:
    #   2.00 1.90 .95 | 1.25 1.90 .95 | 1.25 1.15 .95 | 1.00 1.15 .95 | 1.00 0.90 .95 | 0.75 0.90 .95
    assert [pick(logits, [row])[0].id for _ in range(6)] == [0, 1, 0, 1, 0, 2]


def test_repetition_comes_before_presence_and_frequency():
    for other, expected in ((0.8, 0), (1.2, 1)):  # 4 / 2 - 1 = 1 is between them; (4 - 1) / 2 = 1.5 is above both
        row = picking((), temperature=0.0, presence=1.0, repetition=2.0)
        logits = torch.tensor([[4.0, other, -9.0]])
        assert [pick(logits, [row])[0].id for _ in range(2)] == [0, expected]


def test_penalties_of_one_row_do_not_reach_another():
    rows = [picking(temperature=0.0, presence=50.0), picking(temperature=0.0), picking(temperature=0.0, frequency=-5.0)]
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    assert [[one.id for one in pick(logits, rows)] for _ in range(3)] == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]


def test_bias_is_added_and_a_token_named_twice_gets_both():
    rows = [
        picking(temperature=0.0, logit_bias=((2, 5.0),)),
        picking(temperature=0.0, logit_bias=((0, -100.0),)),
        picking(temperature=0.0, logit_bias=((2, 1.5), (2, 1.5))),
        picking(temperature=0.0),
    ]
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 4)
    assert [one.id for one in pick(logits, rows)] == [2, 1, 2, 0]
    assert logits.tolist() == [[3.0, 2.0, 1.0]] * 4


# ----------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_of_the_raw_logits_whatever_changes_the_pick():
    settings = [
        {"logprobs": 4, "temperature": 0.0},
        {"logprobs": 0, "temperature": 2.0, "top_k": 3},
        {"temperature": 0.0},
        {"logprobs": 2, "logit_bias": ((8, 100.0),), "temperature": 0.0},
    ]
    logits = logits_of(4)
    exact = logits.double().log_softmax(-1)
    picked = pick(logits, [picking(seed=1, **one) for one in settings])
    assert picked[2].logprob is None
    assert picked[3].id == 8
    for at, asked in ((0, 4), (1, 0), (3, 2)):
        report = picked[at].logprob
        assert report is not None
        assert report.id == picked[at].id
        assert report.logprob == pytest.approx(float(exact[at, report.id]), abs=1e-5)
        values, tokens = exact[at].topk(asked)
        assert [token for token, _ in report.alternatives] == tokens.tolist()
        assert [value for _, value in report.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


def test_more_alternatives_than_tokens_are_all_tokens():
    (picked,) = pick(torch.tensor([[0.0, 1.0]]), [picking(logprobs=20)])
    assert picked.logprob is not None
    assert len(picked.logprob.alternatives) == 2


def test_a_token_that_the_model_rules_out_has_a_logprob_that_json_can_say():
    (picked,) = pick(torch.tensor([[0.0, -math.inf]]), [picking(logprobs=2)])
    assert picked.logprob is not None
    assert picked.logprob.alternatives == ((0, 0.0), (1, -9999.0))


# --------------------------------------------------------------------------------------------------------- ends


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it():
    rows = [picking(temperature=0.0, stop_ids=frozenset({1, 2}), logprobs=1), picking(temperature=0.0)]
    logits = torch.tensor([[0.0, 1.0, 0.5]] * 2)
    stopped, other = pick(logits, rows)
    assert (stopped.id, stopped.finish, stopped.logprob) == (None, "stop", None)
    assert (other.id, other.finish) == (1, None)


def test_the_last_token_that_max_tokens_allows_is_part_of_the_answer():
    row = picking(temperature=0.0, max_tokens=2, stop_ids=frozenset({2}))
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert [(one.id, one.finish) for _ in range(2) for one in pick(logits, [row])] == [(1, None), (1, "length")]


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5, "logprobs": 2}, {"repetition": 1.2}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_broken_logits_gets_an_error_and_the_others_go_on(settings, value):
    logits = logits_of(3)
    if value == -math.inf:
        logits[1] = value
    else:
        logits[1, 4] = value
    good = pick(logits[[0, 2]], [picking(seed=0, **settings), picking(seed=2, **settings)])
    picked = pick(logits, [picking(seed=seed, **settings) for seed in range(3)])
    assert picked[1].id is None
    assert picked[1].error is not None
    assert "NaN or infinite" in str(picked[1].error)
    assert not picked[1].error.heals
    assert [picked[0], picked[2]] == good


def test_tokens_that_the_model_rules_out_are_no_error():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]] * 2)
    assert [one.id for one in pick(logits, [picking(), picking(temperature=0.0, frequency=1.0)])] == [1, 1]


def test_a_bias_that_leaves_no_token_is_an_error_of_that_row():
    everything = tuple((token, -math.inf) for token in range(3))
    picked = pick(torch.zeros(2, 3), [picking(logit_bias=everything), picking(temperature=0.0)])
    assert picked[0].error is not None
    assert "logit_bias" in str(picked[0].error)
    assert picked[1].id == 0
