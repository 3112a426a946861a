"""Evaluating the models of a server: prompts, references and scores are those of an evaluation here."""

from __future__ import annotations

import json

import openai_stub
import pytest

from lorakit.data.parse import Row
from lorakit.data.shapes import read_examples
from lorakit.errors import ConfigError, DataError
from lorakit.evaluate.served import chosen_models, evaluate_served, questions_of
from lorakit.serve.client import Client, GenerationSettings, Served, ServerError


def examples(*rows):
    return read_examples([Row(row, "rows.jsonl", n) for n, row in enumerate(rows, 1)])[1]


def test_rows_with_one_prompt_are_one_question_with_all_their_answers():
    questions = questions_of(
        examples(
            {"prompt": "a", "completion": "1"},
            {"prompt": "b", "completion": "2"},
            {"prompt": "a", "completion": " 3 "},
            {"prompt": "a", "references": ["4", "1"]},
        )
    )
    assert [question.prompt for question in questions] == [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}],
    ]
    assert [question.asked.references for question in questions] == [("1", "3", "4"), ("2",)]
    assert questions[1].asked.where == "rows.jsonl, row 2"


def test_a_conversation_is_asked_up_to_its_first_answer():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call], "train": False},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "eight"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    (question,) = questions_of(examples({"messages": turns, "tools": [tool]}))
    assert [turn["role"] for turn in question.prompt] == ["system", "user", "assistant", "tool"]
    sent = question.prompt[2]["tool_calls"][0]
    assert json.loads(sent["function"]["arguments"]) == {"x": 1}
    assert sent["id"]
    assert question.asked.references == ("seven",)
    assert question.tools[0]["function"]["name"] == "f"


def test_a_prompt_can_be_a_text_to_continue():
    (question,) = questions_of(examples({"prompt": "a", "completion": "1"}), continued=True)
    assert question.prompt == "a"
    with pytest.raises(DataError, match="row 1: a conversation, which --template none"):
        questions_of(
            examples({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), True
        )


def test_a_plain_text_has_no_prompt():
    with pytest.raises(DataError, match=r"rows.jsonl, row 1: the row has no prompt to ask a server for"):
        questions_of(examples({"text": "all of it"}))


def test_models_are_scored_side_by_side():
    rows = examples(*({"prompt": f"p{n}", "completion": f"right {n}"} for n in range(20)))

    def answer(path, body):
        asked = body["messages"][-1]["content"]
        return f" right {asked[1:]}\n" if body["model"] == "sql" else "wrong"

    seen = []
    with openai_stub.serving(answer) as stub:
        report = evaluate_served(
            Client(stub.url),
            questions_of(rows),
            ["base", "sql"],
            GenerationSettings(max_tokens=5, temperature=0.0),
            on_rows=lambda model, rows: seen.append(model),
        )
    assert [one.scores.exact_match for one in report.judged] == [0.0, 100.0]
    assert report.judged[1].texts == tuple(f"right {n}" for n in range(20))
    assert (seen.count("base"), seen.count("sql")) == (20, 20)
    assert "loss" not in report.to_dict()["results"][0]
    assert report.table().title == "text from 20 prompts"
    assert [row[0] for row in report.table().cells] == ["base", "sql"]
    assert len(report.samples) == 3


def test_a_server_that_fails_ends_the_evaluation():
    rows = examples(*({"prompt": f"p{n}", "completion": "x"} for n in range(5)))
    no_model = (404, {}, {"error": {"message": "no model 'sqll'"}})
    with openai_stub.serving(lambda path, body: no_model) as stub, pytest.raises(ServerError, match="no model 'sqll'"):
        evaluate_served(Client(stub.url), questions_of(rows), ["sqll"], GenerationSettings())


def test_the_base_is_the_first_model_without_a_parent():
    served = [Served("sql", "llama"), Served("llama")]
    assert chosen_models(served, None, []) == ["llama"]
    assert chosen_models(served, None, ["sql", "other", "sql"]) == ["llama", "sql", "other"]
    assert chosen_models([Served("sql", "gone")], None, []) == ["sql"]
    assert chosen_models([], "given", ["sql"]) == ["given", "sql"]
    with pytest.raises(ConfigError, match="lists no model"):
        chosen_models([], None, [])
