"""Preference rows in the shapes that people have, to pairs of answers; and what is wrong with a row, named."""

from __future__ import annotations

import json

import pytest
import tiny_lm

from lorakit.data.parse import Row
from lorakit.data.preference_items import EARLIER, EQUAL, build_preferences, with_mismatches
from lorakit.data.preferences import is_preference, read_preferences
from lorakit.errors import ConfigError, DataError

PROMPT, GOOD, BAD = "Ada: 2\n", "two apples", "a pear"
USER, ONE, OTHER = (
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": GOOD},
    {"role": "assistant", "content": BAD},
)
PAIR = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}


def rows(*values):
    return [Row(value, "own.jsonl", number) for number, value in enumerate(values, start=1)]


def texts(item, tokenizer):
    """(context, trained text) of each answer."""
    found = []
    for answer in item.answers:
        start = answer.prompt_length
        assert answer.trained == [index >= start for index in range(answer.size)]
        found.append((tokenizer.decode(answer.ids[:start]), tokenizer.decode(answer.ids[start:])))
    return found


@pytest.fixture(scope="module")
def plain():
    return tiny_lm.tokenizer()


@pytest.fixture(scope="module")
def chat():
    return tiny_lm.tokenizer(tiny_lm.CHATML)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"question": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"chosen": f"{PROMPT}{GOOD}", "rejected": f"{PROMPT}{BAD}"},
    ],
)
def test_texts_are_a_pair_whose_answers_end_with_the_end_token(plain, row):
    (item,) = build_preferences(rows(row), plain).items
    assert texts(item, plain) == [(PROMPT, f"{GOOD}</s>"), (PROMPT, f"{BAD}</s>")]
    assert item.desirable is None
    assert (item.size, item.weight) == (max(len(PROMPT + text) + 1 for text in (GOOD, BAD)), 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ONE], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [USER, ONE], "rejected": [USER, OTHER]},
        {"chosen": [USER, ONE], "rejected": [USER, OTHER]},
        {"prompt": PROMPT, "chosen": [USER, ONE], "rejected": [USER, OTHER]},
        {"prompt": PROMPT, "chosen": [ONE], "rejected": [OTHER]},
        {"prompt": PROMPT, "chosen": ONE, "rejected": OTHER},
        {"messages": [USER], "chosen": ONE, "rejected": OTHER},
        {"chosen": json.dumps([USER, ONE]), "rejected": json.dumps([USER, OTHER])},
        {
            "conversations": [{"from": "human", "value": PROMPT}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"instruction": PROMPT, "input": "", "chosen": GOOD, "rejected": BAD},
    ],
)
def test_messages_in_every_shape_are_the_same_pair_in_the_chat_template(chat, row):
    (item,) = build_preferences(rows(row), chat).items
    asked = f"<user>{PROMPT}<assistant>"
    assert texts(item, chat) == [(asked, f"{GOOD}</s>"), (asked, f"{BAD}</s>")]


def test_the_turns_before_the_answer_are_context(chat):
    before = [USER, ONE, {"role": "user", "content": "more"}]
    row = {"chosen": [*before, ONE], "rejected": [*before, OTHER], "system": "Be brief."}
    (item,) = build_preferences(rows(row), chat).items
    asked = f"<system>Be brief.<user>{PROMPT}<assistant>{GOOD}</s><user>more<assistant>"
    assert texts(item, chat) == [(asked, f"{GOOD}</s>"), (asked, f"{BAD}</s>")]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": PROMPT, "completion": GOOD, "label": True}, True),
        ({"prompt": PROMPT, "completion": GOOD, "label": "false"}, False),
        ({"prompt": PROMPT, "answer": GOOD, "label": 1}, True),
    ],
)
def test_an_answer_with_a_label(plain, row, label):
    data = build_preferences(rows(row), plain)
    assert texts(data.items[0], plain) == [(PROMPT, f"{GOOD}</s>")]
    assert data.items[0].desirable is label


def test_of_a_conversation_with_a_label_the_last_answer_counts(chat):
    row = {"messages": [USER, ONE, USER, OTHER], "label": False}
    data = build_preferences(rows(row), chat)
    asked = f"<user>{PROMPT}<assistant>{GOOD}</s><user>{PROMPT}<assistant>"
    assert texts(data.items[0], chat) == [(asked, f"{BAD}</s>")]
    assert data.notes == {EARLIER: 1}


def test_pairs_can_be_taken_apart(plain):
    data = build_preferences(rows(PAIR, PAIR | {"prompt": "Bo: 1\n"}), plain, apart=True)
    assert [item.desirable for item in data.items] == [True, False] * 2
    assert [texts(item, plain)[0][1] for item in data.items] == [f"{GOOD}</s>", f"{BAD}</s>"] * 2


def test_a_mismatched_row_has_the_answer_to_another_prompt(plain):
    data = build_preferences(rows(PAIR, PAIR | {"prompt": "Bo: 1\n", "chosen": "one"}), plain, apart=True)
    items = with_mismatches(data.items, 14)
    shown = [plain.decode(item.mismatched.ids) for item in items]
    assert shown == [f"{PROMPT}{BAD}</s>", f"{PROMPT}{BAD}</s>", f"Bo: 1\n{BAD}</s>", f"Bo: 1\n{BAD}</s>"]
    assert all(item.mismatched.prompt_length == len(item.question) for item in items)
    assert len(with_mismatches(data.items, 9)[0].mismatched.ids) == 9
    (alone,) = with_mismatches(data.items[:1], 14, data.items)  # a held-out row, with the answer of a training row
    assert plain.decode(alone.mismatched.ids) == f"{PROMPT}one</s>"
    with pytest.raises(DataError, match=r"row 1: all rows have the same prompt"):
        with_mismatches(data.items[:2], 14)


def test_columns_of_other_names(plain):
    row = {"q": PROMPT, "win": GOOD, "lose": BAD, "score": 3}
    data = build_preferences(rows(row), plain, columns={"prompt": "q", "chosen": "win", "rejected": "lose"})
    assert texts(data.items[0], plain)[1] == (PROMPT, f"{BAD}</s>")
    assert data.notes == {"columns that are not used: score": 1}
    with pytest.raises(DataError, match=r"'chosn' is not a column of preference rows; did you mean 'chosen'"):
        build_preferences(rows(row), plain, columns={"chosn": "win"})
    with pytest.raises(DataError, match=r"no column 'wins'.*did you mean 'win'"):
        build_preferences(rows(row), plain, columns={"chosen": "wins"})


def test_equal_answers_are_left_out_and_counted(plain):
    data = build_preferences(rows(PAIR, PAIR | {"rejected": GOOD}, PAIR | {"weight": 0}), plain)
    assert [item.row.number for item in data.items] == [1]
    assert data.notes == {EQUAL: 1, "weight 0, so they are left out": 1}
    with pytest.raises(DataError, match="in every row, chosen and rejected are equal"):
        build_preferences(rows(PAIR | {"rejected": GOOD}), plain)


def test_long_answers_leave_their_pair_out_or_are_cut_and_are_counted(plain):
    long = PAIR | {"prompt": "Bo: 1\n", "rejected": "pear " * 8}
    data = build_preferences(rows(PAIR, long), plain, max_length=24)
    assert ([item.row.number for item in data.items], data.dropped, data.cut) == ([1], 1, 0)
    data = build_preferences(rows(PAIR, long), plain, max_length=24, on_long="cut")
    assert (len(data.items), data.dropped, data.cut, data.items[1].size) == (2, 0, 1, 24)
    same = PAIR | {"rejected": f"{GOOD} and pears"}  # after the cut there is nothing to tell them by
    data = build_preferences(rows(PAIR, same), plain, max_length=17, on_long="cut")
    assert ([item.row.number for item in data.items], data.dropped) == ([1], 1)
    with pytest.raises(DataError, match="every row is longer than max_length 9"):
        build_preferences(rows(PAIR), plain, max_length=9)
    with pytest.raises(ConfigError, match="on_long: split would part an answer from its prompt"):
        build_preferences(rows(PAIR), plain, on_long="split")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"chosen": ""}, "row 1: chosen is empty"),
        (PAIR | {"rejected": "  "}, "row 1: rejected is empty"),
        (PAIR | {"prompt": ""}, "row 1: prompt is empty"),
        (PAIR | {"chosen": [ONE]}, "chosen is messages and rejected is a text"),
        (PAIR | {"chosen": 3}, r"chosen is expected to be a list of turns"),
        ({"prompt": PROMPT, "chosen": GOOD}, "no rejected, but chosen: a pair needs both"),
        ({"prompt": PROMPT, "rejected": GOOD}, "no chosen, but rejected: a pair needs both"),
        ({"prompt": PROMPT, "completion": GOOD}, "no preference; columns found: prompt, completion"),
        ({"prompt": PROMPT, "completion": GOOD, "label": "good"}, "label is 'good'; expected true"),
        ({"prompt": PROMPT, "completion": "", "label": True}, "completion is empty"),
        ({"chosen": "yes", "rejected": "no"}, "no common beginning, and there is no prompt: their prompts differ"),
        (
            {"chosen": [USER, ONE], "rejected": [USER | {"content": "other"}, OTHER]},
            "differ in their first turn: their prompts differ",
        ),
        (
            {"chosen": [USER, ONE, USER, ONE], "rejected": [USER, ONE, USER | {"content": "other"}, OTHER]},
            r"chosen\[2\], where the conversations part, is a turn of role user: their prompts differ",
        ),
        ({"prompt": [USER], "chosen": [USER, ONE], "rejected": [OTHER]}, "do not both begin with the prompt"),
        ({"prompt": "What?", "chosen": [USER, ONE], "rejected": [USER, OTHER]}, "the prompt is not in the turns"),
        ({"chosen": [USER], "rejected": [USER, OTHER]}, "chosen is empty"),
        (
            {"chosen": [USER, {"role": "bot", "content": "x"}], "rejected": [USER, OTHER]},
            r"chosen\[1\]: unknown role 'bot'",
        ),
        ({"question": PROMPT, "input": PROMPT, "chosen": GOOD, "rejected": BAD}, "could each be the prompt"),
        ({"instruction": "", "chosen": GOOD, "rejected": BAD}, "instruction and input are both empty"),
        ({"instruction": "x", "history": ["y"], "chosen": GOOD, "rejected": BAD}, "history is expected to be a list"),
    ],
)
def test_what_is_wrong_with_a_row(plain, row, message):
    with pytest.raises(DataError, match=message):
        build_preferences(rows(row), plain)


def test_all_rows_are_of_one_kind(plain):
    labelled = {"prompt": PROMPT, "completion": GOOD, "label": True}
    with pytest.raises(DataError, match=r"row 2: it has one answer and its label, but the rows before it have a pair"):
        build_preferences(rows(PAIR, labelled), plain)
    with pytest.raises(DataError, match="its answer has a label, but this loss compares two answers"):
        build_preferences(rows(labelled), plain, apart=False)
    with pytest.raises(DataError, match="every row has weight 0"):
        read_preferences(rows(PAIR | {"weight": 0}))
    with pytest.raises(DataError, match="no rows"):
        read_preferences([])


def test_several_answers_that_the_template_rewrites_are_refused():
    shortened = "{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}"
    template = tiny_lm.CHATML.replace("{{ m.content }}", shortened)
    row = {"prompt": [USER], "chosen": [ONE, USER, ONE], "rejected": [OTHER]}
    with pytest.raises(DataError, match="chosen has several assistant turns, and the chat template rewrites"):
        build_preferences(rows(row), tiny_lm.tokenizer(template))


def test_the_digest_tells_what_is_trained(plain):
    labels = [{"prompt": PROMPT, "completion": GOOD, "label": label} for label in (True, False)]
    swapped = PAIR | {"chosen": BAD, "rejected": GOOD}
    items = [build_preferences(rows(row), plain).items[0] for row in (PAIR, swapped, *labels)]
    assert len({item.digest() for item in items}) == 4
    assert len({item.split_key for item in items}) == 1


def test_rows_that_can_be_nothing_else_are_recognized():
    assert is_preference(PAIR)
    assert is_preference({"chosen": [USER, ONE], "rejected": [USER, OTHER]})
    assert is_preference({"messages": [USER, ONE], "label": False})
    assert is_preference({"prompt": PROMPT, "completion": GOOD, "label": True})
    assert not is_preference({"text": PROMPT, "label": True})
    assert not is_preference({"prompt": PROMPT, "completion": GOOD, "label": 1})
    assert not is_preference({"prompt": PROMPT, "completion": GOOD})
