"""Shapes are recognised by their columns, and rows that do not fit are named with file and row."""

from __future__ import annotations

import json

import pytest

from lorakit.data.parse import Row
from lorakit.data.shapes import read_examples
from lorakit.errors import DataError


def turns(example):
    return [(m.role, m.content, m.trained) for m in example.messages]


def refused(rows, *words, columns=None):
    with pytest.raises(DataError) as caught:
        read_examples(rows, columns)
    for word in words:
        assert word in str(caught.value)


PAIR = [("user", "2+2?", False), ("assistant", "4", True)]


@pytest.mark.parametrize(
    "names", [("prompt", "completion"), ("prompt", "response"), ("input", "output"), ("question", "answer")]
)
def test_prompt_and_completion_are_read_under_their_usual_names(rows, names):
    shape, (example,) = read_examples(rows(dict(zip(names, ["2+2?", "4"])) | {"id": 7}))
    assert (shape, example.kind, turns(example)) == ("prompt/completion", "completion", PAIR)


def test_the_first_reference_is_the_completion_where_there_is_none(rows):
    _, (alone, beside) = read_examples(
        rows(
            {"prompt": "2+2?", "references": ["4", "four"]}, {"prompt": "2+2?", "completion": "IV", "references": ["4"]}
        )
    )
    assert turns(alone) == PAIR
    assert alone.references == ("4", "four")
    assert turns(beside)[1][1] == "IV"


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"system": None, "history": []}])
def test_alpaca_without_input_is_the_instruction_alone(rows, empty):
    shape, (example,) = read_examples(rows({"instruction": "2+2?", "output": "4"} | empty))
    assert (shape, example.kind, turns(example)) == ("alpaca", "chat", PAIR)


def test_alpaca_input_follows_a_blank_line_and_system_and_history_come_first(rows):
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["1 and 1", "2"]],
        "text": "ignored",
    }
    shape, (example,) = read_examples(rows(row))
    assert shape == "alpaca"
    assert turns(example) == [
        ("system", "Be brief.", False),
        ("user", "1 and 1", False),
        ("assistant", "2", True),
        ("user", "Add.\n\n2 and 2", False),
        ("assistant", "4", True),
    ]


def test_openai_messages_keep_roles_and_order(rows):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    shape, (example,) = read_examples(rows({"messages": messages, "label": True}))
    assert (shape, turns(example)) == ("messages", [("system", "S", False), *PAIR])


def test_sharegpt_roles_become_chat_template_roles(rows):
    conversation = [("human", "2+2?"), ("function_call", "add(2, 2)"), ("observation", "4"), ("gpt", "It is 4.")]
    row = {
        "conversations": [{"from": who, "value": what} for who, what in conversation],
        "system": "S",
        "tools": json.dumps([{"name": "add"}]),
    }
    shape, (example,) = read_examples(rows(row))
    assert shape == "conversations"
    assert [(m.role, m.trained) for m in example.messages] == [
        ("system", False),
        ("user", False),
        ("assistant", True),
        ("tool", False),
        ("assistant", True),
    ]
    assert example.tools == ({"name": "add"},)


def test_conversational_prompt_and_completion_trains_the_completion_alone(rows):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    _, (example,) = read_examples(rows({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}))
    assert example.kind == "chat"
    assert [m.content for m in example.messages if m.trained] == ["d"]


def test_an_assistant_turn_that_opens_the_conversation_is_context(rows):
    conversation = [
        {"from": "gpt", "value": "Hi, I am here."},
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "4"},
    ]
    _, (example,) = read_examples(rows({"conversations": conversation}))
    assert [m.trained for m in example.messages] == [False, False, True]


def test_text_is_one_trained_message(rows):
    shape, (example,) = read_examples(rows({"text": "Once."}))
    assert (shape, example.kind, turns(example)) == ("text", "text", [("assistant", "Once.", True)])


def test_columns_map_our_names_to_the_files(rows):
    _, (example,) = read_examples(
        rows({"mr": "2+2?", "ref": "4", "text": "other"}), {"prompt": "mr", "completion": "ref"}
    )
    assert turns(example) == PAIR


def test_mapped_columns_decide_the_shape(rows):
    shape, (example,) = read_examples(rows({"prompt": "p", "completion": "c", "body": "Once."}), {"text": "body"})
    assert (shape, turns(example)) == ("text", [("assistant", "Once.", True)])


def test_a_mapping_decides_between_two_candidate_columns(rows):
    row = rows({"question": "2+2?", "input": "x", "output": "4"})
    refused(row, "question and input could each be the prompt")
    assert turns(read_examples(row, {"prompt": "question"})[1][0]) == PAIR


def test_a_mapping_to_a_missing_column_suggests_the_nearest(rows):
    refused(
        rows({"mr": "a", "reference": "b"}),
        "no column 'refrence'",
        "did you mean 'reference'",
        columns={"prompt": "mr", "completion": "refrence"},
    )
    refused(rows({"mr": "a", "ref": "b"}), "'promt' is not a column", "did you mean 'prompt'", columns={"promt": "mr"})


def test_an_unknown_shape_lists_the_columns_found_the_shapes_and_a_mapping(rows):
    refused(
        rows({"mr": "a", "ref": "b"}),
        "data.jsonl, row 1",
        "columns found: mr, ref",
        *["prompt/completion", "alpaca", "messages", "conversations", "text"],
        "columns: {prompt: mr, completion: ref}",
    )


def test_rows_of_two_shapes_are_an_error_at_the_first_that_differs(rows):
    refused(
        rows({"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}), "row 3", "prompt/completion", "are text"
    )


def test_preference_pairs_are_refused_with_a_way_to_train_on_the_chosen(rows):
    row = rows({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    refused(row, "preference pairs", "completion: chosen")
    assert turns(read_examples(row, {"prompt": "prompt", "completion": "chosen"})[1][0]) == PAIR
    asking = [{"role": "user", "content": "2+2?"}]
    answer = {"role": "assistant", "content": "4"}
    refused(rows({"chosen": [*asking, answer], "rejected": []}), "columns: {messages: chosen}")
    asked = {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}}
    row = rows(asked | {"rejected": {"from": "gpt", "value": "5"}})
    refused(row, "columns: {prompt: conversations, completion: chosen}")
    _, (example,) = read_examples(row, {"prompt": "conversations", "completion": "chosen"})
    assert [(m.role, m.content, m.trained) for m in example.messages] == [
        ("user", "2+2?", False),
        ("assistant", "4", True),
    ]


@pytest.mark.parametrize("completion", ["4", {"role": "assistant", "content": "4"}])
def test_a_prompt_of_messages_takes_a_completion_of_one_turn(rows, completion):
    _, (example,) = read_examples(rows({"prompt": [{"role": "user", "content": "2+2?"}], "completion": completion}))
    assert example.kind == "chat"
    assert [(m.role, m.content, m.trained) for m in example.messages] == [
        ("user", "2+2?", False),
        ("assistant", "4", True),
    ]


@pytest.mark.parametrize("empty", ["", "  \n", None])
@pytest.mark.parametrize(
    "row, name",
    [
        ({"prompt": "p"}, "completion"),
        ({"instruction": "i", "input": "x"}, "output"),
        ({"question": "q"}, "answer"),
        ({}, "text"),
    ],
)
def test_an_empty_completion_is_an_error_with_its_row(rows, row, name, empty):
    good = row | {name: "fine"}
    refused(rows(good, row | {name: empty}), f"data.jsonl, row 2: {name} is empty")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": 3, "completion": "c"}, ["prompt is expected to be text", "int 3"]),
        ({"prompt": "p", "completion": ["c"]}, ["completion is expected to be text", "list"]),
        ({"prompt": None, "completion": "c"}, ["prompt is expected to be text", "null"]),
        ({"text": "half \ud83d"}, ["text has half a surrogate pair"]),
        ({"prompt": "p", "references": []}, ["references is empty"]),
        ({"prompt": "p", "references": ["a", " "]}, ["references[1] is empty"]),
        ({"prompt": "p", "references": {"a": 1}}, ["list of texts"]),
        ({"instruction": "", "input": "", "output": "o"}, ["instruction and input are both empty"]),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, ["history", "pairs"]),
        ({"messages": []}, ["an empty list"]),
        ({"messages": "hello"}, ["list of turns", "str"]),
        ({"messages": '[{"role": "user"'}, ["messages, column", "broken JSON"]),
        ({"messages": ["hello"]}, ["messages[0]", "object"]),
        ({"messages": [{"role": "asistant", "content": "x"}]}, ["unknown role 'asistant'", "did you mean 'assistant'"]),
        ({"messages": [{"content": "x"}]}, ["unknown role None"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            ["messages[0].content is expected to be text"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            ["messages[1]", "empty"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                ]
            },
            ["messages[1].tool_calls[0] is no call", "function"],
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, ["no assistant turn", "turns: user"]),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, ["no assistant turn that answers"]),
        ({"conversations": [{"from": "robot", "value": "a"}]}, ["unknown from 'robot'"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "{"},
            ["tools, column 2", "broken JSON"],
        ),
    ],
)
def test_an_untrainable_row_is_named_with_file_and_row(rows, row, words):
    refused(rows(row), "data.jsonl, row 1", *words)


def test_no_rows_is_an_error():
    refused([], "no rows")


def test_a_conversation_may_be_json_text(rows):
    text = json.dumps([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
    shape, (example,) = read_examples(rows({"messages": text}))
    assert (shape, turns(example)) == ("messages", PAIR)


@pytest.mark.parametrize("at", [0, 2])
def test_a_row_without_its_completion_among_good_ones_is_called_that(at):
    rows = [Row({"prompt": "a", "completion": "b"}, "rows.jsonl", number) for number in (1, 2, 3)]
    rows[at] = Row({"prompt": "a"}, "rows.jsonl", at + 1)
    with pytest.raises(DataError) as error:
        read_examples(rows)
    assert str(error.value) == (
        f"rows.jsonl, row {at + 1}: no completion, which other rows have\n  complete the row, or remove it"
    )
