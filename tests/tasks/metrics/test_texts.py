"""Scores of generated text agree with sacrebleu and rouge_score; bad input is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu, sentence_chrf

from lorakit.errors import ConfigError, DataError
from lorakit.tasks.metrics.texts import compared, lcs_length, rouge_l, rouge_n, score

MEASURES = ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")
texts = st.text(alphabet="ab cA1.,-'é£\n", max_size=25)


@settings(max_examples=150, deadline=None)
@given(texts, texts)
def test_rouge_l_equals_the_rouge_score_package(prediction, reference):
    theirs = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_l_of_rows_is_the_mean_of_each_rows_best_reference(rows):
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score_multi(references, text)["rougeL"].fmeasure for text, references in rows]
    ours = score([text for text, _ in rows], [references for _, references in rows]).rouge_l
    assert ours == pytest.approx(100 * sum(theirs) / len(theirs), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(texts, texts)
def test_rouge_1_and_2_equal_the_rouge_score_package(prediction, reference):
    theirs = RougeScorer(["rouge1", "rouge2"]).score(reference, prediction)
    for n in (1, 2):
        assert rouge_n(prediction, reference, n) == pytest.approx(theirs[f"rouge{n}"].fmeasure, abs=1e-12)


def test_repeated_words_count_as_often_as_in_both():
    assert rouge_n("a a a b", "a a c", 1) == pytest.approx(2 * 2 / 7)
    assert rouge_n("a a a b", "a a c", 2) == pytest.approx(2 * 1 / 5)


def test_exact_match_compares_what_is_asked_for():
    """GSM8K's final answer; SQL without regard to case and spaces."""
    answers, right = ["7+5=12 so #### 12", "it is 12", "#### 1 #### 13"], [["#### 12"], ["#### 12"], ["x #### 13 "]]
    assert score(answers, right).exact_match == 0
    assert score(answers, right, compared(r"####\s*(\d+)")).exact_match == pytest.approx(200 / 3)
    assert score(["12 or 13"], [["13"]], compared(r"\d+")).exact_match == 100  # the last one, without a group
    sql = ["select  A from\tt", "SELECT a"], [["SELECT a FROM t"], ["SELECT b"]]
    assert score(*sql, compared(None, normalize=True)).exact_match == 50
    with pytest.raises(DataError, match=r"references\[0\]: '####' is in none of them, such as '12'"):
        score(["#### 12"], [["12"]], compared("####"))
    with pytest.raises(ConfigError, match="not a regular expression"):
        compared("(")


def test_subsequence_need_not_be_contiguous():
    assert lcs_length(["a", "x", "b", "y", "c"], ["a", "b", "z", "c"]) == 3
    assert lcs_length([], ["a"]) == 0


def test_identical_texts_score_100():
    text = "The Vaults is a cheap pub near Café Adriatic."
    scores = score([text], [[text]])
    assert scores.to_dict() == pytest.approx(dict.fromkeys((*MEASURES, "exact_match"), 100) | {"rows": 1})


def test_disjoint_texts_score_zero():
    scores = score(["aaa bbb ccc ddd"], [["xxx yyy zzz www"]])
    assert (scores.rouge_l, scores.exact_match, scores.chrf) == (0, 0, 0)
    assert scores.bleu < 20  # smoothing keeps a one-row BLEU above zero


def test_bleu_and_chrf_use_every_reference_when_rows_have_different_numbers():
    predictions = ["the cat sat on the mat today", "dogs bark loudly at night here"]
    references = [
        ["a cat was on a mat", "the cat sat on the mat today", "cats sit around on mats"],
        ["dogs bark loudly at night here"],
    ]
    scores = score(predictions, references)
    assert scores.bleu == pytest.approx(100)
    assert scores.chrf == pytest.approx(100)
    assert score(predictions, [row[:1] for row in references]).bleu < 90


def test_a_row_without_more_references_is_not_padded_with_an_empty_one():
    # An empty second reference would make the brevity penalty's closest reference length 0 and raise the short text's
    # BLEU.
    predictions = ["the cat sat on", "dogs bark loudly at night"]
    references = [["the cat sat on the mat today again"], ["dogs bark loudly at night", "a dog barks at night"]]
    alone = score(predictions[:1], references[:1])
    assert alone.bleu == pytest.approx(sentence_bleu(predictions[0], references[0], use_effective_order=False).score)
    padded = score(predictions, [[*references[0], ""], references[1]])
    assert score(predictions, references).bleu < padded.bleu


def test_one_row_equals_sacrebleu_on_that_row():
    prediction, references = "the small cat sat", ["the cat sat down", "a small cat was sitting"]
    assert score([prediction], [references]).chrf == pytest.approx(sentence_chrf(prediction, references).score)


def test_exact_match_ignores_outer_whitespace_only():
    scores = score([" yes\n", "no", "Yes"], [["yes"], ["n o", "no "], ["yes"]])
    assert scores.exact_match == pytest.approx(100 * 2 / 3)


def test_unequal_lengths_are_refused_with_both_counts():
    with pytest.raises(DataError, match="2 predictions but 1 rows"):
        score(["a", "b"], [["a"]])


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        score([], [])


def test_a_row_without_references_is_named():
    with pytest.raises(DataError, match=r"references\[1\] is empty"):
        score(["a", "b"], [["a"], []])


def test_a_plain_text_in_place_of_a_list_of_references_is_refused():
    with pytest.raises(DataError, match=r"references\[0\] is a single text"):
        score(["a"], ["abc"])
