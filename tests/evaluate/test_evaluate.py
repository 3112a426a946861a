"""Base and adapters over the same rows: each is judged as itself, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

import lorakit as lk
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, DataError, StateError
from lorakit.evaluate.evaluate import evaluate, prompts_of
from lorakit.generate.generate import generate
from lorakit.tasks.metrics.texts import score
from lorakit.tasks.text.perplexity import perplexity


@pytest.fixture
def items(make_item):
    return [
        make_item("say one:", " uno", 1),
        make_item("say two:", " dos", 2, references=["duo", "zwei"]),
        make_item("say one:", " eins", 3),
        make_item("say one:", " uno", 4),
    ]


@pytest.fixture
def adapted(llama):
    """The tiny Llama with two adapters that change its output, `first` with half its weight active."""
    for seed, name in enumerate(["first", "second"]):
        lk.attach(llama, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), name=name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in llama.named_parameters():
                if "lora_" in parameter_name and name in parameter_name:
                    parameter.normal_(std=0.5)
    lk.activate(llama, {"first": 0.5})
    return llama


def printed(table) -> str:
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(table)
    return out.getvalue()


def test_each_adapter_is_judged_as_if_it_were_the_active_one(adapted, tokenizer, items):
    report = evaluate(adapted, tokenizer, items, [None, "first", "second"], generate=True, max_new_tokens=6)
    assert [one.adapter for one in report.judged] == [None, "first", "second"]
    assert len({one.loss.loss for one in report.judged}) == 3
    for one in report.judged:
        lk.activate(adapted, one.adapter)
        assert one.loss == perplexity(adapted, items, 0)
        texts = [
            text.strip() for text in generate(adapted, tokenizer, [p.ids for p in report.prompts], max_new_tokens=6)
        ]
        assert list(one.texts) == texts
        assert one.scores == score(texts, [p.references for p in report.prompts])


def test_what_was_active_before_is_active_afterwards(adapted, tokenizer, items):
    evaluate(adapted, tokenizer, items, [None, "second"])
    assert lk.active(adapted) == {"first": 0.5}
    lk.activate(adapted, None)
    evaluate(adapted, tokenizer, items, ["second"])
    assert lk.active(adapted) == {}


def test_what_was_active_before_is_active_after_an_error(adapted, tokenizer, items):
    broken = dataclasses.replace(items[0], trained=[False] * len(items[0].ids))
    with pytest.raises(DataError, match="row 1"):
        evaluate(adapted, tokenizer, [broken], ["second"])
    assert lk.active(adapted) == {"first": 0.5}


def test_a_model_without_adapters_is_judged_as_the_base(llama, tokenizer, items):
    report = evaluate(llama, tokenizer, items)
    assert report.judged[0].loss == perplexity(llama, items, 0)
    assert (report.judged[0].scores, report.prompts, report.sample_table()) == (None, (), None)


def test_rows_with_one_prompt_are_one_prompt_with_all_their_answers(items, tokenizer):
    first, second = prompts_of(items, tokenizer)
    assert (first.text, first.references, first.where) == ("say one:", ("uno", "eins"), "rows.jsonl, row 1")
    assert (second.text, second.references) == ("say two:", ("dos", "duo", "zwei"))


def test_references_may_stand_in_another_column(make_item, tokenizer):
    item = make_item("q", " a", answers="b")
    assert prompts_of([item], tokenizer, references_column="answers")[0].references == ("a", "b")


def test_in_a_conversation_the_first_trained_answer_is_the_reference(make_item, tokenizer):
    one, two = make_item("hi ", "first answer"), make_item("next ", "second answer")
    both = dataclasses.replace(one, ids=one.ids + two.ids, trained=one.trained + two.trained)
    for known in (both, dataclasses.replace(both, prompt=None)):
        assert [(p.text, p.references) for p in prompts_of([known], tokenizer)] == [("hi", ("first answer",))]


def test_the_number_of_prompts_can_be_bounded_and_the_loss_still_sees_every_row(llama, tokenizer, make_item):
    items = [make_item(f"prompt {i}", " answer", i) for i in range(6)]
    report = evaluate(llama, tokenizer, items, generate=True, max_new_tokens=2, max_prompts=3, samples=2)
    assert [p.text for p in report.prompts] == ["prompt 0", "prompt 2", "prompt 4"]
    assert report.judged[0].loss.rows == 6
    assert report.judged[0].scores.rows == 3
    assert len(report.to_dict()["samples"]) == 2


def test_the_report_is_json_and_says_what_was_judged(adapted, tokenizer, items):
    report = evaluate(adapted, tokenizer, items, [None, "first"], generate=True, max_new_tokens=4, samples=1)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [result["adapter"] for result in told["results"]] == [None, "first"]
    assert told["results"][1]["loss"] == report.judged[1].loss.loss
    assert told["results"][1]["scores"]["bleu"] == report.judged[1].scores.bleu
    assert told["samples"] == [
        {
            "prompt": "say one:",
            "references": ["uno", "eins"],
            "texts": [
                {"adapter": None, "text": report.judged[0].texts[0]},
                {"adapter": "first", "text": report.judged[1].texts[0]},
            ],
        }
    ]


def test_the_table_has_a_line_for_each_and_scores_only_when_asked(adapted, tokenizer, items):
    short = printed(evaluate(adapted, tokenizer, items, [None, "second"]).table())
    assert "base" in short
    assert "second" in short
    assert "BLEU" not in short
    report = evaluate(adapted, tokenizer, items, [None, "second"], generate=True, max_new_tokens=4)
    long = printed(report.table())
    for heading in ("loss", "perplexity", "BLEU", "chrF", "ROUGE-L", "exact match", "4 rows", "2 prompts"):
        assert heading in long
    assert f"{report.judged[1].loss.loss:.4f}" in long


def test_square_brackets_in_the_data_are_shown_not_taken_for_markup(llama, tokenizer, make_item):
    report = evaluate(
        llama, tokenizer, [make_item("name[bold] [/nonsense]", " [red]x")], generate=True, max_new_tokens=3
    )
    shown = printed(report.sample_table())
    assert "name[bold] [/nonsense]" in shown
    assert "[red]x" in shown


def test_progress_says_what_is_done_for_whom(adapted, tokenizer, items):
    told = []
    evaluate(
        adapted,
        tokenizer,
        items,
        [None, "first"],
        generate=True,
        max_new_tokens=2,
        on_rows=lambda what, rows: told.append((what, rows)),
    )
    assert told == [("base: loss", 4), ("base: text", 2), ("first: loss", 4), ("first: text", 2)]


def test_an_unknown_adapter_is_refused_with_the_nearest_name_before_anything_runs(adapted, tokenizer, items):
    told = []
    with pytest.raises(StateError, match="no adapter named 'secnd' is attached; did you mean 'second'"):
        evaluate(adapted, tokenizer, items, [None, "secnd"], on_rows=lambda *_: told.append(1))
    assert told == []


def test_no_adapters_and_plain_text_rows_are_refused(llama, tokenizer, make_item):
    with pytest.raises(ConfigError, match="no adapter to evaluate"):
        evaluate(llama, tokenizer, [make_item("a", "b")], [])
    with pytest.raises(DataError, match=r"row 5: the row has no prompt to generate from"):
        evaluate(llama, tokenizer, [make_item("", "plain text", 5)], generate=True)


def test_a_prompt_without_room_names_the_rows_place(llama, tokenizer, make_item):
    with pytest.raises(DataError, match=r"rows\.jsonl, row 8 has 100 tokens"):
        evaluate(llama, tokenizer, [make_item("a" * 100, "b", 8)], generate=True, max_new_tokens=64)


def test_answers_that_the_token_limit_ended_are_counted(adapted, tokenizer, items):
    from lorakit.generate.generate import end_ids
    from lorakit.generate.generate import generate as write

    options = {"generate": True, "max_new_tokens": 3}
    report = evaluate(adapted, tokenizer, items, [None], **options)
    counted = []
    write(adapted, tokenizer, [p.ids for p in report.prompts], max_new_tokens=3, on_cut=counted.append)
    assert report.judged[0].cut == report.to_dict()["results"][0]["cut"] <= len(report.prompts)
    assert end_ids(adapted, tokenizer)
    assert sorted(set(counted)) == sorted(counted)
    assert [row[-1] for row in report.table().cells] == [str(report.judged[0].cut)]
