"""Questions with choices: which one is right, what a choice is read with, what is refused."""

from __future__ import annotations

import pytest
import tiny_lm
import tiny_tokenizers

from lorakit.data.choices import collate_choices, read_choices, read_unchosen
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError

CHOICES = ["tea", "sand", "2", "B"]


def rows(*values):
    return [Row(value, "rows.jsonl", number) for number, value in enumerate(values, start=1)]


def row(**changes):
    return {"question": "What?", "choices": CHOICES, "answer": 0} | changes


def test_a_digit_that_is_no_number_is_no_index():
    with pytest.raises(DataError, match="row 1: its answer is '²'"):
        read_choices(rows(row(answer="²")), tiny_lm.tokenizer())


@pytest.mark.parametrize(
    ("answer", "label"),
    [(0, 0), (3, 3), ("1", 1), ("tea", 0), ("A", 0), ("D", 3), ("2", 2), ("B", 3)],  # the last two are texts of choices
)
def test_the_right_choice_is_an_index_a_letter_or_a_text(answer, label):
    (item,) = read_choices(rows(row(answer=answer)), tiny_lm.tokenizer()).items
    assert item.label == label


def test_a_choice_is_read_after_context_and_question():
    tokenizer = tiny_lm.tokenizer()
    (item,) = read_choices(rows(row(context="Ada is here.")), tokenizer).items
    assert tokenizer.decode(item.rows[1]) == "Ada is here.\nWhat?\nsand"
    wordpiece = tiny_tokenizers.wordpiece()
    (item,) = read_choices(rows(row(choices=["Ada", "Bo"])), wordpiece).items
    assert [wordpiece.decode(ids).count("[SEP]") for ids in item.rows] == [2, 2]
    assert item.segments[0] == [int(place > item.rows[0].index(3)) for place in range(len(item.rows[0]))]
    only_context = read_choices(rows({"context": "It", "choices": ["a", "b"], "answer": 1}), tokenizer).items[0]
    assert tokenizer.decode(only_context.rows[0]) == "It\na"


def test_arcs_choices_have_labels_of_their_own():
    choices = {"text": ["tea", "sand"], "label": ["1", "2"]}
    (item,) = read_choices(rows({"question": "What?", "choices": choices, "answer": "2"}), tiny_lm.tokenizer()).items
    assert (item.choices, item.label) == (("tea", "sand"), 1)


def test_a_batch_has_the_choices_side_by_side():
    items = read_choices(rows(row(), row(question="Which one?")), tiny_lm.tokenizer()).items
    batch = collate_choices(items, 0)
    assert batch["input_ids"].shape == (2, 4 * 16)
    assert batch["choices"].shape == (2, 4)
    assert batch["input_ids"].unflatten(1, (4, -1))[1, 2, : len(items[1].rows[2])].tolist() == items[1].rows[2]
    assert items[0].group == 4
    assert items[1].size == 4 * items[1].longest


def test_long_rows_are_dropped_or_cut():
    data = rows(row(), row(choices=["tea" * 20, "sand"]))
    dropped = read_choices(data, tiny_lm.tokenizer(), max_length=12)
    assert ([item.row.number for item in dropped.items], dropped.dropped) == ([1], 1)
    cut = read_choices(data, tiny_lm.tokenizer(), max_length=12, on_long="cut")
    assert ([item.longest for item in cut.items], cut.cut) == ([10, 12], 1)
    assert cut.shape == "question, choices, answer; 2 to 4 choices"
    with pytest.raises(ConfigError, match="on_long: split"):
        read_choices(data, tiny_lm.tokenizer(), on_long="split")


def test_rows_to_predict_need_no_answer_and_are_never_cut():
    (item,) = read_unchosen(rows({"question": "What?", "choices": ["a", "b"]}), tiny_lm.tokenizer(), {"answer": "x"})
    assert len(item.rows) == 2
    with pytest.raises(DataError, match="row 1: a choice with its question is 10 tokens, but 8 are the most"):
        read_unchosen(rows(row()), tiny_lm.tokenizer(), {}, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"its answer is 4\n  expected an index from 0 to 3"),
        ({"answer": "teas"}, "its answer is 'teas'; did you mean 'tea'"),
        ({"answer": True}, "its answer is True"),
        ({"answer": -1}, "its answer is -1"),
        ({"answer": None}, "no answer; columns found"),
        ({"choices": ["tea"]}, r"its choices are \['tea'\]; expected a list of two texts"),
        ({"choices": "tea, sand"}, "its choices are 'tea, sand'"),
        ({"choices": ["tea", "tea"]}, "two of its choices are the same"),
        ({"question": None}, "no question and no context"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    with pytest.raises(DataError, match=f"row 2: {message}"):
        read_choices(rows(row(), row(**change)), tiny_lm.tokenizer())
