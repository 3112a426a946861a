"""Rows of texts that belong together, or have a score: their columns, their range; bad rows are named."""

from __future__ import annotations

import pytest
import tiny_lm

from lorakit.data.contrasts import Encoding, read_contrasts, read_texts
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError


def rows(*values):
    return [Row(dict(each), "rows.jsonl", number) for number, each in enumerate(values, start=1)]


@pytest.fixture(scope="module")
def encoding():
    return Encoding(tiny_lm.tokenizer())


def decoded(encoding, item):
    return [encoding.tokenizer.decode(text) for text in item.texts]


@pytest.mark.parametrize(
    ("values", "columns", "texts"),
    [
        ({"anchor": "a", "positive": "b"}, {}, ["a", "b"]),
        ({"query": "a", "passage": "b", "negative": "c"}, {}, ["a", "b", "c"]),
        ({"question": "a", "document": "b", "negatives": ["c", "d"]}, {}, ["a", "b", "c", "d"]),
        ({"text": "a", "positive": "b", "negative": None}, {}, ["a", "b"]),
        ({"x": "a", "y": "b"}, {"anchor": "x", "positive": "y"}, ["a", "b"]),
    ],
)
def test_columns_of_contrasts(values, columns, texts, encoding):
    (item,) = read_contrasts(rows(values), encoding, columns=columns).items
    assert decoded(encoding, item) == texts
    assert item.score is None


@pytest.mark.parametrize(
    ("scores", "span", "shares"),
    [
        ((0.0, 4.0), [0, 5], [0, 0.8]),
        (("0.2", "0.9"), [0, 1], [0.2, 0.9]),
        ((-1, 0.5), [-1, 1], [0, 0.75]),
        ((-20, 300), [-20, 300], [0, 1]),
    ],
)
def test_scores_become_shares_of_their_range(scores, span, shares, encoding):
    made = rows(*({"text": f"a{i}", "text_pair": "b", "score": score} for i, score in enumerate(scores)))
    found = read_contrasts(made, encoding)
    assert found.about == {"score_range": span}
    assert [item.score for item in found.items] == pytest.approx(shares)


def test_long_texts_are_cut_with_their_special_tokens_or_rows_dropped(encoding):
    made = rows({"anchor": "a" * 20, "positive": "b"}, {"anchor": "c", "positive": "d"})
    cut = read_contrasts(made, Encoding(encoding.tokenizer, with_end=True), max_length=4)
    assert cut.cut == 1
    assert decoded(encoding, cut.items[0]) == ["aaa</s>", "b</s>"]
    assert len(read_contrasts(made, encoding, max_length=4, on_long="drop").items) == 1
    with pytest.raises(ConfigError, match="split"):
        read_contrasts(made, encoding, on_long="split")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"anchor": "a"}], "row 1: no second text; columns found: anchor"),
        ([{"positive": "a"}], "row 1: no text"),
        ([{"anchor": "a", "query": "b", "positive": "c"}], "anchor and query could each be the anchor"),
        ([{"anchor": "a", "positive": " "}], "row 1: positive is empty"),
        ([{"anchor": "a", "positive": 3}], "positive is expected to be text"),
        ([{"anchor": "a", "positive": "b", "negatives": 3}], "negatives is expected to be a list"),
        ([{"anchor": "a", "positive": "b", "negative": "c", "score": 1}], "a score and negatives"),
        ([{"text": "a", "text_pair": "b", "score": "high"}], "its score is 'high'; expected a number"),
        ([{"text": "a", "text_pair": "b", "score": 1}] * 2, "every row has the score 1"),
        ([{"text": "a", "text_pair": "b", "score": 1}, {"text": "a", "text_pair": "b"}], "row 2: it has no score"),
    ],
)
def test_bad_rows_are_named(values, said, encoding):
    with pytest.raises(DataError, match=said):
        read_contrasts(rows(*values), encoding)


def test_a_score_outside_of_the_range_is_named(encoding):
    made = rows({"text": "a", "text_pair": "b", "score": 1}, {"text": "a", "text_pair": "c", "score": 6})
    with pytest.raises(DataError, match="row 2: its score is 6, outside of score_range 0 to 5"):
        read_contrasts(made, encoding, score_range=[0, 5])


def test_rows_to_predict_have_one_text_or_two(encoding):
    items = read_texts(rows({"text": "a"}, {"passage": "b"}, {"query": "c", "positive": "d"}), encoding, {}, 3)
    assert [decoded(encoding, item) for item in items] == [["a"], ["b"], ["c", "d"]]
    with pytest.raises(DataError, match="row 1: no text; columns found: txt"):
        read_texts(rows({"txt": "a"}), encoding, {}, None)
