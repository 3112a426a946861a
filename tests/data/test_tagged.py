"""Rows of words with tags: which token carries a word's tag, with tokenizers of several kinds; what is refused."""

from __future__ import annotations

import pytest
import tiny_lm
import tiny_tokenizers

from lorakit.data.parse import Row
from lorakit.data.tagged import collate_tagged, read_tagged, read_untagged
from lorakit.errors import ConfigError, DataError
from lorakit.ops import IGNORE_INDEX as SKIP


def rows(*values):
    return [Row(value, "rows.jsonl", number) for number, value in enumerate(values, start=1)]


ONE = {"tokens": ["Ada", "lives", "in", "Abuja"], "tags": ["B-PER", "O", "O", "B-LOC"]}


@pytest.mark.parametrize("kind", ["bytes", "byte_bpe", "byte_bpe_prefix_space", "wordpiece"])
def test_the_first_token_of_a_word_carries_its_tag(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    (item,) = read_tagged(rows(ONE), tokenizer).items
    assert item.weight == 4
    labelled = [(tokenizer.decode([i]).strip(), label) for i, label in zip(item.ids, item.labels) if label != SKIP]
    assert [label for _, label in labelled] == [2, 0, 0, 1]  # O, B-LOC, B-PER
    assert [text[0].lower() for text, _ in labelled] == ["a", "l", "i", "a"]
    for place, word in zip(item.places, ONE["tokens"], strict=True):  # and the tokens up to the next are the word's
        after = next((p for p in item.places if p > place), len(item.ids))
        assert tokenizer.decode(item.ids[place:after], skip_special_tokens=True).strip().lower() == word.lower()


def test_text_is_tokenized_as_it_was_in_pretraining():
    """With spaces between words, which is_split_into_words would lose here."""
    tokenizer = tiny_tokenizers.byte_bpe()
    (item,) = read_tagged(rows(ONE), tokenizer).items
    assert item.ids == tokenizer("Ada lives in Abuja")["input_ids"]


def test_a_number_that_is_not_among_numbers_is_an_error_and_no_place_among_them():
    data = rows({"tokens": ["a", "b"], "tags": [2, 1]})
    with pytest.raises(DataError, match=r"row 1: the tag '1' is none of 3(.|\n)*0, 2, 4"):
        read_tagged(data, tiny_lm.tokenizer(), names=["0", "2", "4"])
    assert read_tagged(rows({"tokens": ["a", "b"], "tags": ["²", "1"]}), tiny_lm.tokenizer()).names == ["1", "²"]


def test_names_are_those_of_the_data_o_first_or_given():
    tokenizer = tiny_lm.tokenizer()
    numbers = {"words": ["a", "b"], "ner_tags": [1, 0]}
    assert read_tagged(rows(ONE), tokenizer).names == ["O", "B-LOC", "B-PER"]
    assert read_tagged(rows(numbers), tokenizer).names == ["0", "1"]
    named = read_tagged(rows(numbers), tokenizer, names=["O", "B-X"])
    assert [label for label in named.items[0].labels if label != SKIP] == [1, 0]
    assert named.shape == "words, ner_tags"
    assert read_tagged(
        rows({"w": ["a", "b"], "t": ["x", "y"]}), tokenizer, columns={"tokens": "w", "tags": "t"}
    ).names == ["x", "y"]
    skipped = read_tagged(rows({"tokens": ["a", "b", "c"], "tags": [-100, 0, 1]}), tokenizer)
    assert (skipped.names, skipped.items[0].weight) == (["0", "1"], 2)


def test_long_rows_are_cut_with_a_note_or_dropped():
    tokenizer = tiny_lm.tokenizer()
    data = rows(ONE, {"tokens": ["Bo"], "tags": ["B-PER"]})
    cut = read_tagged(data, tokenizer, max_length=8)
    assert ([item.weight for item in cut.items], cut.cut, cut.dropped) == ([2, 1], 1, 0)
    assert cut.notes == {"are cut at 8 tokens, and 2 words at their ends are left out": 1}
    assert cut.items[0].places[2:] == [None, None]
    dropped = read_tagged(data, tokenizer, max_length=8, on_long="drop")
    assert ([item.weight for item in dropped.items], dropped.dropped) == ([1], 1)
    with pytest.raises(ConfigError, match="on_long: split"):
        read_tagged(data, tokenizer, on_long="split")


def test_words_without_a_token_are_counted():
    found = read_tagged(rows({"tokens": ["a", "", "b"], "tags": ["x", "y", "z"]}), tiny_lm.tokenizer())
    assert found.items[0].weight == 2
    assert "1 words of which the tokenizer makes no token of their own are left out" in found.notes


def test_a_batch_is_padded_with_labels_that_do_not_count():
    found = read_tagged(rows(ONE, {"tokens": ["Bo"], "tags": ["B-PER"]}), tiny_lm.tokenizer())
    batch = collate_tagged(found.items, 0)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 24)
    assert int((batch["labels"] != SKIP).sum()) == 5
    assert batch["attention_mask"].sum(1).tolist() == [18, 2]


def test_rows_to_predict_need_no_tags_and_are_never_cut():
    items = read_untagged(rows({"words": ["Ada", "sat"]}), tiny_lm.tokenizer(), {"tags": "t"}, 20)
    assert items[0].places == [0, 4]
    with pytest.raises(DataError, match=r"row 1: 4 words are 18 tokens, but 8 are the most\n  split the row"):
        read_untagged(rows(ONE), tiny_lm.tokenizer(), {}, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (({"tokens": ["a"], "tags": ["x", "y"]},), "row 1: 1 words, but 2 tags"),
        (({"tokens": "a b", "tags": ["x", "y"]},), "row 1: its words are 'a b'"),
        (({"tokens": [], "tags": []},), "row 1: its words are"),
        (({"tokens": ["a", 1], "tags": ["x", "y"]},), "row 1: its words are"),
        ((ONE, {"tokens": ["a"], "tags": [1.5]}), r"row 2: its tags are \[1.5\]"),
        ((ONE, {"tokens": ["a"]}), "row 2: no tags; columns found: tokens"),
        (({"tokens": ["a"], "tags": ["x"]},), "every word has the tag 'x'"),
    ],
)
def test_what_cannot_be_read_is_named(values, message):
    with pytest.raises(DataError, match=message):
        read_tagged(rows(*values), tiny_lm.tokenizer())


def test_a_tag_that_has_no_name_is_an_error():
    with pytest.raises(DataError, match=r"row 1: the tag 'B-PER' is none of 2; did you mean 'B-PRE'"):
        read_tagged(rows(ONE), tiny_lm.tokenizer(), names=["O", "B-PRE"])
