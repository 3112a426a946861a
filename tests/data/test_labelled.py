"""Labelled rows: what is read, in which order labels are numbered, what is cut, what is refused."""

from __future__ import annotations

import pytest
import tiny_lm
import torch

from lorakit.data.batches import pad_id
from lorakit.data.labelled import collate_labelled, read_labelled, read_measured, read_unlabelled
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return tiny_lm.tokenizer()


def rows(*values):
    return [Row(value, "rows.jsonl", number) for number, value in enumerate(values, start=1)]


def labelled(*labels):
    return rows(*({"text": f"text {i}", "label": label} for i, label in enumerate(labels)))


@pytest.mark.parametrize(
    "labels, names, numbers",
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),  # by size, not by their first digit
        (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),
        ([True, False], ["False", "True"], [1, 0]),
        ([" x ", "y"], ["x", "y"], [0, 1]),
        ([1.0, 0.0, "1.00"], ["0", "1"], [1, 0, 1]),  # a table's column of whole numbers that has gaps
    ],
)
def test_labels_are_numbered_in_order(bytes_tokenizer, labels, names, numbers):
    found = read_labelled(labelled(*labels), bytes_tokenizer)
    assert found.names == names
    assert [item.label for item in found.items] == numbers


def test_given_names_keep_their_order_and_numbers_in_the_data_mean_them(bytes_tokenizer):
    assert [i.label for i in read_labelled(labelled("neg", "pos"), bytes_tokenizer, names=["pos", "neg"]).items] == [
        1,
        0,
    ]
    assert [i.label for i in read_labelled(labelled(1, 0, 1), bytes_tokenizer, names=["neg", "pos"]).items] == [1, 0, 1]


def test_a_number_that_is_not_among_numbers_is_an_error_and_no_place_among_them(bytes_tokenizer):
    with pytest.raises(DataError, match=r"row 2: the label '1' is none of 3(.|\n)*0, 2, 4"):
        read_labelled(labelled(0, 1), bytes_tokenizer, names=["0", "2", "4"])
    with pytest.raises(DataError, match="the label '²' is none of 2"):  # a digit, and no number
        read_labelled(labelled("²"), bytes_tokenizer, names=["neg", "pos"])
    assert read_labelled(labelled("²", "--1", "1"), bytes_tokenizer).names == ["--1", "1", "²"]


@pytest.mark.parametrize("label", [3.8, "3.800", float("nan")])
def test_a_number_between_whole_ones_is_no_class_unless_it_is_among_the_names(bytes_tokenizer, label):
    with pytest.raises(DataError, match=r"rows.jsonl, row 2: its label is .*whole number\n.*--task regression.*labels"):
        read_labelled(labelled(5, label), bytes_tokenizer)
    names = ["2", str(label)]
    assert [i.label for i in read_labelled(labelled(2, label), bytes_tokenizer, names=names).items] == [0, 1]


def test_a_pair_stands_in_one_row_with_something_between(bytes_tokenizer):
    found = read_labelled(
        rows({"text": "ab", "text_pair": "cd", "label": 0}, {"text": "x", "text_pair": "y", "label": 1}),
        bytes_tokenizer,
    )
    assert found.shape == "text, text_pair, label"
    assert bytes_tokenizer.decode(found.items[0].ids) == "ab\ncd"
    assert found.items[0].segments is None


def test_a_tokenizer_with_segments_gives_them():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5}, unk_token="c"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    found = read_labelled(
        rows({"text": "a b", "text_pair": "c", "label": 0}, {"text": "a", "text_pair": "b", "label": 1}), made
    )
    assert [(item.ids, item.segments) for item in found.items] == [
        ([1, 3, 4, 2, 5, 2], [0, 0, 0, 0, 1, 1]),
        ([1, 3, 2, 4, 2], [0, 0, 0, 1, 1]),
    ]
    batch = collate_labelled(found.items, pad_id(made))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 5]
    assert torch.equal(batch["labels"], torch.tensor([0, 1]))
    short = read_labelled(rows({"text": "a b a b", "label": 0}, {"text": "a", "label": 1}), made, max_length=4)
    assert [item.ids for item in short.items] == [[1, 3, 4, 2], [1, 3, 2]]  # the end stays
    assert short.cut == 1


def test_long_rows_are_cut_or_dropped(bytes_tokenizer):
    data = rows({"text": "x" * 20, "label": 0}, {"text": "y" * 5, "label": 1})
    cut = read_labelled(data, bytes_tokenizer, max_length=8)
    assert ([item.size for item in cut.items], cut.cut, cut.dropped) == ([8, 5], 1, 0)
    dropped = read_labelled(data, bytes_tokenizer, max_length=8, on_long="drop")
    assert ([item.size for item in dropped.items], dropped.cut, dropped.dropped) == ([5], 0, 1)
    with pytest.raises(ConfigError, match="on_long: split"):
        read_labelled(data, bytes_tokenizer, on_long="split")


@pytest.mark.parametrize(
    "values, options, message",
    [
        (({"text": "a"}, {"text": "b"}), {}, "row 1: no label; columns found: text"),
        (({"text": "a", "label": 1}, {"text": None, "label": 0}), {}, "row 2: no text"),
        (({"text": "a", "label": 1}, {"text": " ", "label": 0}), {}, "row 2: its text is empty"),
        (({"text": "a", "label": 1}, {"text": "b", "label": [0]}), {}, r"row 2: its label is \[0\]"),
        (({"text": "a", "label": 0.5}, {"text": "b", "label": 1}), {}, "row 1: its label is 0.5"),
        (({"text": "a", "label": 1}, {"text": "b", "label": 1}), {}, "every row has the label '1'"),
        (
            ({"text": "a", "label": "x"}, {"text": "b", "label": "yy"}),
            {"names": ["x", "y"]},
            "row 2: the label 'yy' is none of 2.*did you mean 'y'",
        ),
        (({"text": "a", "label": 1}, {"text": "b", "text_pair": "c", "label": 0}), {}, "row 2: it has a text_pair"),
        (({"text": "a", "text_pair": "b", "label": 1}, {"text": "b", "label": 0}), {}, "row 2: its text_pair is None"),
        (({"text": "a", "label": 1},), {"columns": {"text": "sentence"}}, "row 1: no column 'sentence'"),
        (
            ({"text": "a", "label": 1},),
            {"columns": {"txt": "text"}},
            "'txt' is not a column of labelled rows; did you mean 'text'",
        ),
    ],
)
def test_what_cannot_be_read_is_named(bytes_tokenizer, values, options, message):
    with pytest.raises(DataError, match=message):
        read_labelled(rows(*values), bytes_tokenizer, **options)


def test_columns_may_have_other_names(bytes_tokenizer):
    data = rows({"sentence": "a", "class": "x"}, {"sentence": "b", "class": "y"})
    assert read_labelled(data, bytes_tokenizer, columns={"text": "sentence", "label": "class"}).names == ["x", "y"]


def test_columns_that_nothing_reads_and_rows_of_weight_0_are_counted(bytes_tokenizer):
    values = [{"text": "a", "label": "x", "id": 1}, {"text": "b", "label": "y", "id": None}]
    found = read_labelled(rows(*values, values[0] | {"weight": 0}, values[1] | {"weight": 1.0}), bytes_tokenizer)
    assert [item.row.number for item in found.items] == [1, 2, 4]
    assert found.notes == {"columns that are not used: id": 2, "weight 0, so they are left out": 1}
    with pytest.raises(DataError, match=r"row 1: weight is 0\.5"):
        read_labelled(rows(values[0] | {"weight": 0.5}), bytes_tokenizer)
    with pytest.raises(DataError, match="every row has weight 0"):
        read_labelled(rows(values[0] | {"weight": 0}), bytes_tokenizer)


def test_a_weight_that_is_mapped_is_a_column_like_others(bytes_tokenizer):
    values = [{"text": "a", "weight": "heavy"}, {"text": "b", "weight": "light"}]
    found = read_labelled(rows(*values), bytes_tokenizer, columns={"label": "weight"})
    assert (found.names, found.notes) == (["heavy", "light"], {})


def test_numbers_are_read_for_regression(bytes_tokenizer):
    data = rows({"text": "a", "label": 3.8}, {"text": "b", "label": "1.250"}, {"text": "c", "label": 2})
    found = read_measured(data, bytes_tokenizer)
    assert [item.label for item in found.items] == [3.8, 1.25, 2.0]
    assert found.about["targets"]["mean"] == pytest.approx((3.8 + 1.25 + 2) / 3)
    assert (
        found.items[0].digest() != read_measured(rows({"text": "a", "label": 3.9}), bytes_tokenizer).items[0].digest()
    )
    for bad in ("high", None, True, float("nan"), [1]):
        with pytest.raises(DataError, match=r"row 2: (its label is|no label)"):
            read_measured(rows({"text": "a", "label": 1}, {"text": "b", "label": bad}), bytes_tokenizer)


def test_a_header_is_not_taken_for_a_row_of_numbered_columns(bytes_tokenizer):
    columns = {"text": "1", "label": "2"}
    lines = rows(
        *({"1": text, "2": label} for text, label in (("sentence", "label"), ("a", "1"), ("b", "0"), ("c", "1")))
    )
    with pytest.raises(DataError, match=r"row 1: its label 'label' occurs in no other row.*\n.*'sentence', 'label'"):
        read_labelled(lines, bytes_tokenizer, columns=columns)
    assert read_labelled(lines[1:], bytes_tokenizer, columns=columns).names == ["0", "1"]
    with pytest.raises(
        DataError, match=r"row 1: its label is 'label'; expected a number such as 3\.8; if this line is a"
    ):
        read_measured(lines, bytes_tokenizer, columns=columns)


def test_rows_to_predict_need_no_label_and_are_cut_to_fit(bytes_tokenizer):
    data = rows({"text": "abc"}, {"text": "x" * 20, "label": "any"})
    items = read_unlabelled(data, bytes_tokenizer, {"label": "class"}, 8)
    assert [item.size for item in items] == [3, 8]
    with pytest.raises(DataError, match="row 2: no text; columns found: label"):
        read_unlabelled(rows({"text": "a"}, {"label": 1}), bytes_tokenizer)
