"""Questions with answers in a text: where an answer's tokens are, windows of long contexts, rows without an answer."""

from __future__ import annotations

import pytest
import tiny_lm
import tiny_tokenizers

from lorakit.data.answers import Windows, collate_windows, questions_of, read_questions, read_unanswered, rows_of
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError

CONTEXT = "Bo lived in Lagos, and Ada in Abuja!"
ROW = {"question": "Who lives in Abuja?", "context": CONTEXT, "answers": {"text": ["Ada"], "answer_start": [23]}}
KINDS = ["bytes", "byte_bpe", "byte_bpe_prefix_space", "wordpiece"]


def rows(*values):
    return [Row(value, "rows.jsonl", number) for number, value in enumerate(values, start=1)]


def answered(item) -> str:
    """The text of an item's answer, by the offsets of its first and last token."""
    first, last = item.span
    return "" if (first, last) == (0, 0) else item.context[item.offsets[first][0] : item.offsets[last][1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_tokens_are_those_of_its_characters(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    (item,) = read_questions(rows(ROW), tokenizer).items
    assert answered(item) == "Ada"
    assert tokenizer.decode(item.ids[item.span[0] : item.span[1] + 1]).strip().lower() == "ada"
    own = [span for span in item.offsets if span is not None and span[0] < span[1]]
    assert "".join(CONTEXT[start:end] for start, end in own) == CONTEXT.replace(" ", "")
    assert item.offsets[0] is None  # what (0, 0) stands for is never a part of the context
    assert (item.segments is not None) == (kind == "wordpiece")


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_context_is_windows_that_overlap_and_leave_nothing_out(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    whole = Windows(tokenizer, 1 << 20, 0).of(rows(ROW)[0], "Who?", CONTEXT, ())[0]
    before = sum(span is None for span in whole.offsets)
    made = Windows(tokenizer, before + 8, 3).of(rows(ROW)[0], "Who?", CONTEXT, ())
    assert len(made) > 1
    parts = [[span for span in item.offsets if span is not None] for item in made]
    assert all(item.size <= before + 8 for item in made)
    assert [left[-3:] for left in parts[:-1]] == [right[:3] for right in parts[1:]]
    joined = [*parts[0], *(span for part in parts[1:] for span in part[3:])]
    assert joined == [span for span in whole.offsets if span is not None]


def test_a_window_without_the_whole_answer_has_none():
    tokenizer = tiny_lm.tokenizer()
    found = read_questions(rows(ROW), tokenizer, window=40, stride=8)
    assert [answered(item) for item in found.items] == ["", "Ada", ""]
    assert found.about == {"no_answer": False, "window": 40, "stride": 8}
    assert rows_of(found.items) == [list(range(len(found.items)))]
    assert "are longer than a window of 40 tokens, and are several that share 8" in found.notes
    assert len({item.split_key for item in found.items}) == 1  # held out together


def test_an_answer_that_no_window_holds_is_left_out_with_a_note():
    long = ROW | {"answers": {"text": ["Lagos, and Ada in Abuja"], "answer_start": [12]}}
    found = read_questions(rows(ROW, long), tiny_lm.tokenizer(), window=36, stride=8)
    assert {item.row.number for item in found.items} == {1}
    assert found.dropped == 0  # left out for its answer, with the note; not for its length
    assert [count for note, count in found.notes.items() if note.startswith("have an answer that no window")] == [1]


def test_windows_are_no_longer_than_384_or_the_models_positions():
    tokenizer = tiny_lm.tokenizer()
    data = rows(ROW | {"context": CONTEXT + " So." * 200})
    assert read_questions(data, tokenizer).max_length == 96  # the tokenizer's model_max_length
    assert read_questions(data, tokenizer, positions=64).max_length == 64
    with pytest.raises(ConfigError, match="window: 128 is more than the 64 positions"):
        read_questions(data, tokenizer, window=128, positions=64)
    with pytest.raises(DataError, match=r"row 1: its question and special tokens are 20 tokens.*no room.*\n.*larger"):
        read_questions(data, tokenizer, window=24, stride=8)


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        ({"answers": {"text": ["Ada", "Ada in Abuja"], "answer_start": [23, 23]}}, ("Ada", "Ada in Abuja")),
        ({"answers": {"text": "Ada", "answer_start": 23}}, ("Ada",)),
        ({"answers": ["Ada"]}, ("Ada",)),
        ({"answer": "Ada"}, ("Ada",)),
    ],
)
def test_answers_have_several_shapes(answers, texts):
    row = {"question": "Who?", "context": CONTEXT} | answers
    (item,) = read_questions(rows(row), tiny_lm.tokenizer()).items
    assert item.answers == texts
    assert answered(item) == "Ada"


def test_an_answer_that_stands_there_twice_is_the_first_with_a_note():
    row = {"question": "Who?", "context": "Ada sees Ada.", "answer": "Ada"}
    found = read_questions(rows(row), tiny_lm.tokenizer())
    assert found.items[0].offsets[found.items[0].span[0]] == (0, 1)
    assert any("several times: the first is taken" in note for note in found.notes)


@pytest.mark.parametrize("none", [{"text": [], "answer_start": []}, [], {"text": [""], "answer_start": [0]}])
def test_a_question_without_an_answer_is_learnt_as_such_or_refused(none):
    data = rows(ROW, ROW | {"answers": none})
    found = read_questions(data, tiny_lm.tokenizer())
    assert [(item.answers, answered(item), item.may_be_empty) for item in found.items] == [
        (("Ada",), "Ada", True),
        ((), "", True),
    ]
    assert found.notes == {"have no answer, and the model learns to say so": 1}
    with pytest.raises(DataError, match=r"row 2: it has no answer, and no_answer is false\n.*no_answer: true"):
        read_questions(data, tiny_lm.tokenizer(), no_answer=False)


def test_squads_own_files_are_questions_of_paragraphs():
    qas = [
        {"question": "Who?", "id": "1", "answers": [{"text": "Ada", "answer_start": 23}]},
        {"question": "Why?", "id": "2", "is_impossible": True, "answers": []},
    ]
    article = {"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}
    found = list(questions_of(rows(article)))
    assert [(row.values["question"], row.number) for row in found] == [("Who?", 1), ("Why?", 2)]
    assert [item.answers for item in read_questions(rows(article), tiny_lm.tokenizer()).items] == [("Ada",), ()]


@pytest.mark.parametrize(
    ("paragraph", "message"),
    [
        ({"context": CONTEXT, "qas": [{"question": "Who?", "answers": None}]}, "row 1: no answers"),
        ({"context": CONTEXT, "qas": [{"question": "Who?"}]}, "row 1: no answers"),
        ({"context": CONTEXT, "qas": [{"question": "Who?", "answers": [None]}]}, r"row 1: its answers are \[None\]"),
        ({"context": CONTEXT, "qas": None}, r"row 1: a paragraph has no list of questions \(qas\)"),
        (None, r"row 1: a paragraph has no list of questions \(qas\)"),
    ],
)
def test_a_paragraph_that_is_not_squads_is_named(paragraph, message):
    with pytest.raises(DataError, match=message):
        read_questions(rows({"paragraphs": [paragraph]}), tiny_lm.tokenizer())


def test_a_batch_has_the_places_of_first_and_last_token():
    items = read_questions(rows(ROW, ROW | {"answers": []}), tiny_tokenizers.wordpiece()).items
    batch = collate_windows(items, 0)
    assert batch["start_positions"].tolist() == [items[0].span[0], 0]
    assert batch["end_positions"].tolist() == [items[0].span[1], 0]
    assert {"input_ids", "attention_mask", "token_type_ids"} < batch.keys()


def test_rows_to_predict_need_no_answers_and_are_one_item_each():
    made = Windows(tiny_lm.tokenizer(), 30, 8, True)
    items = read_unanswered(rows({"question": "Who?", "text": CONTEXT}), {"context": "text", "answer": "x"}, made)
    assert len(items) == 1
    assert len(items[0].windows) == 2
    assert items[0].windows[0].may_be_empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["Ada"], "answer_start": [22]}}, "the answer 'Ada' does not stand .* at character 22"),
        ({"answers": ["Eve"]}, "the answer 'Eve' does not stand in the context: it is nowhere"),
        ({"answers": {"text": ["Ada", "Bo"], "answer_start": [23]}}, r"2 answers, but answer_start is \[23\]"),
        ({"answers": 3}, "its answers are 3"),
        ({"answers": None}, "no answers\n.*answers: \\[\\] for a question without one"),
        ({"context": " "}, "its context is ' '"),
        ({"question": None}, "no question; columns found"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    with pytest.raises(DataError, match=f"row 2: {message}"):
        read_questions(rows(ROW, ROW | change), tiny_lm.tokenizer())


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"Slow does not say which characters.*\n.*tokenizer\.json"):
        read_questions(rows(ROW), Slow())
