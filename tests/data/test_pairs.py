"""Pairs of source and target: columns of many data sets, the end token, limits of both sides; bad rows are named."""

from __future__ import annotations

import pytest
import tiny_lm

from lorakit.data.pairs import collate_pairs, read_pairs, read_sources, source_ids, target_ids, with_languages
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError
from lorakit.ops import IGNORE_INDEX


def rows(*values):
    return [Row(dict(each), "rows.jsonl", number) for number, each in enumerate(values, start=1)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_lm.tokenizer()


def texts(tokenizer, *values, **options):
    found = read_pairs(rows(*values), tokenizer, **options)
    return [(tokenizer.decode(item.ids), item.references) for item in found.items]


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ({"source": "a", "target": "b"}, {}),
        ({"prompt": "a", "completion": "b"}, {}),
        ({"question": "a", "answer": "b"}, {}),
        ({"input": "a", "output": "b"}, {}),
        ({"text": "a", "summary": "b"}, {}),
        ({"article": "a", "highlights": "b"}, {}),
        ({"instruction": "a", "input": "", "output": "b"}, {}),
        ({"en": "a", "de": "b"}, {"source": "en", "target": "de"}),
        ({"translation": {"en": "a", "de": "b"}}, {"source": "en", "target": "de"}),
        ({"translation": {"de": "b", "en": "a"}}, {"prompt": "en", "completion": "de"}),
        ({"text": "a", "prompt": "x", "summary": "b"}, {"text": "text"}),
        ({"source": "a", "references": ["b"]}, {}),
    ],
)
def test_columns_of_both_sides(values, columns, tokenizer):
    assert texts(tokenizer, values, columns=columns) == [("a", ("b",))]


def test_an_instruction_has_its_input_below_and_references_are_kept(tokenizer):
    row = {"instruction": "do", "input": "x", "output": "y", "references": ["z", "y"]}
    assert texts(tokenizer, row) == [("do\n\nx", ("y", "z"))]


def test_targets_end_with_the_end_token_once(tokenizer):
    assert target_ids(tokenizer, "b") == [*tokenizer.encode("b"), tiny_lm.EOS]
    assert target_ids(tokenizer, "b</s>") == [*tokenizer.encode("b"), tiny_lm.EOS]
    endless = tiny_lm.tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="no end"):
        target_ids(endless, "b")


def test_a_prefix_is_before_every_source(tokenizer):
    assert tokenizer.decode(source_ids(tokenizer, "x", "sum: ")) == "sum: x"


def test_rows_over_a_limit_are_dropped_or_cut(tokenizer):
    own = [{"source": "a" * n, "target": "b" * m} for n, m in ((9, 2), (2, 9), (2, 2))]
    dropped = read_pairs(rows(*own), tokenizer, max_length=4, max_target_length=4)
    assert [item.row.number for item in dropped.items] == [3]
    assert (dropped.dropped, dropped.cut) == (2, 0)
    cut = read_pairs(rows(*own), tokenizer, max_length=4, max_target_length=4, on_long="cut")
    assert [(len(item.ids), len(item.target)) for item in cut.items] == [(4, 3), (2, 4), (2, 3)]
    assert tiny_lm.EOS not in cut.items[1].target  # it does not end here
    with pytest.raises(DataError, match="longer than max_length 2 "):
        read_pairs(rows(own[0]), tokenizer, max_length=2, max_target_length=2)
    with pytest.raises(ConfigError, match="use drop or cut"):
        read_pairs(rows(own[0]), tokenizer, on_long="split")


def test_a_batch_is_padded_on_both_sides(tokenizer):
    items = read_pairs(rows({"source": "abc", "target": "d"}, {"source": "a", "target": "bcdefghi"}), tokenizer).items
    batch = collate_pairs(items, tiny_lm.PAD)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2, 16),
    }
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [2, 9] == [item.weight for item in items]


def test_sources_to_predict_need_no_target(tokenizer):
    ids = read_sources(rows({"en": "a", "x": 1}), tokenizer, {"source": "en", "target": "de"}, "> ")
    assert tokenizer.decode(ids[0]) == "> a"


@pytest.mark.parametrize(
    ("values", "columns", "said"),
    [
        ({"sorce": "a", "target": "b"}, {}, "row 1: no source; columns found: sorce, target"),
        ({"source": "a"}, {}, "row 1: no target"),
        ({"source": "a", "prompt": "b", "target": "c"}, {}, "source and prompt could each be the source"),
        ({"source": "a", "target": " "}, {}, "row 1: target is empty"),
        ({"source": "", "target": "b"}, {}, "row 1: its source is empty"),
        ({"source": 3, "target": "b"}, {}, "row 1: source is expected to be text"),
        ({"messages": []}, {}, "an encoder reads one text, not turns"),
        ({"translation": {"en": "a", "de": "b"}}, {}, r"columns: \{source: en, target: de\}"),
        ({"a": "x", "target": "b"}, {"sourc": "a"}, "did you mean 'source'"),
        ({"a": "x", "target": "b"}, {"source": "aa"}, "no column 'aa'.*did you mean 'a'"),
        ({"source": "a", "target": "b", "weight": 0}, {}, "every row has weight 0"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(values, columns, said, tokenizer):
    with pytest.raises(DataError, match=said):
        read_pairs(rows(values), tokenizer, columns=columns)


def test_what_nothing_reads_is_said(tokenizer):
    found = read_pairs(
        rows({"source": "a", "target": "b", "id": 1}, {"source": "c", "target": "d", "weight": 0}), tokenizer
    )
    assert found.notes == {"columns that are not used: id": 1, "weight 0, so they are left out": 1}


def test_languages_are_the_tokenizers():
    class Languages:
        src_lang, tgt_lang, lang_code_to_id = "en", None, {"en": 1, "de": 2}

    own = Languages()
    found = with_languages(own, "de", "en")
    assert (found.src_lang, found.tgt_lang, own.src_lang) == ("de", "en", "en")
    assert with_languages(own, None, None) is own
    with pytest.raises(ConfigError, match="target_language: the tokenizer does not know 'dee'; did you mean 'de'"):
        with_languages(own, None, "dee")
