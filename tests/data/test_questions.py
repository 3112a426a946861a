"""Rows to answer, in every shape: rendered as training would, up to the answer."""

from __future__ import annotations

import pytest
import tiny_lm

from lorakit.data.dataset import build
from lorakit.data.parse import Row
from lorakit.data.questions import read_questions
from lorakit.data.render import Renderer
from lorakit.errors import DataError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}
WHOLE = {
    "prompt/completion": ({"prompt": "a b", "completion": " c"}, {"prompt": "a b"}),
    "references": ({"question": "a", "references": ["c", "d"]}, {"question": "a"}),
    "alpaca": ({"instruction": "do", "input": "x", "output": "y"}, {"instruction": "do", "input": "x"}),
    "messages": ({"messages": TURNS}, {"messages": TURNS[:1]}),
    "conversations": ({"conversations": SHAREGPT}, {"conversations": SHAREGPT[:1]}),
    "prompt as turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": TURNS[:1]}),
}


def rows(*values):
    return [Row(dict(each), "rows.jsonl", number) for number, each in enumerate(values, start=1)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_lm.tokenizer(tiny_lm.CHATML)


@pytest.mark.parametrize("shape", WHOLE)
def test_a_question_is_what_training_renders_before_the_answer(shape, tokenizer):
    answered, open_question = WHOLE[shape]
    (item,) = build(rows(answered), tokenizer).items
    for values in (answered, open_question):
        (example,) = read_questions(rows(values))
        assert Renderer(tokenizer).prompt(example) == item.ids[: item.prompt_length]
        assert example.row.values == values


def test_a_preference_is_asked_as_its_chosen_answer_was(tokenizer):
    implicit = {"chosen": TURNS, "rejected": [*TURNS[:1], {"role": "assistant", "content": "no"}]}
    pair, turns = (read_questions(rows(each))[0] for each in (PREFERENCE, implicit))
    assert Renderer(tokenizer).prompt(pair) == tokenizer.encode("a")
    assert tokenizer.decode(Renderer(tokenizer).prompt(turns)) == "<user>hi<assistant>"


def test_a_text_is_continued(tokenizer):
    (example,) = read_questions(rows({"text": "once upon"}))
    assert Renderer(tokenizer).prompt(example) == tokenizer.encode("once upon")


def test_prompts_can_be_turns_of_a_conversation(tokenizer):
    (example,) = read_questions(rows({"prompt": "hi", "system": "be kind", "completion": "no"}), as_turns=True)
    assert tokenizer.decode(Renderer(tokenizer, "chat").prompt(example)) == "<system>be kind<user>hi<assistant>"


def test_columns_are_named_and_those_of_answers_may_be_missing(tokenizer):
    values = {"q": "hi", "n": 1}
    (example,) = read_questions(rows(values), {"prompt": "q", "completion": "a"})
    assert Renderer(tokenizer).prompt(example) == tokenizer.encode("hi")
    with pytest.raises(DataError, match=r"no column 'qq'.*did you mean 'q'"):
        read_questions(rows(values), {"prompt": "qq"})


def test_every_row_is_kept_also_one_of_weight_0():
    found = read_questions(rows({"prompt": "a", "weight": 0}, {"prompt": "b"}))
    assert [example.row.number for example in found] == [1, 2]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"promt": "a"}, r"row 2: nothing to answer; columns found: promt; did you mean 'prompt'\?"),
        ({"question": "a", "input": "b"}, "could each be the prompt"),
        ({"prompt": 3}, "row 2: prompt is expected to be text"),
        ({"messages": []}, "row 2: messages is expected to be a list of turns"),
    ],
)
def test_a_row_that_asks_nothing_is_named(values, said):
    with pytest.raises(DataError, match=said):
        read_questions(rows({"prompt": "fine"} if "messages" not in values else {"messages": TURNS}, values))
