"""`lorakit predict`: a line for each row, in order, beside the row's own columns; or an error and no file."""

from __future__ import annotations

import json

import pytest
import tiny_lm

import lorakit as lk
from lorakit.bases.load import load_model, load_tokenizer
from lorakit.generate.generate import generate


def lines(path_or_text) -> list[dict]:
    text = path_or_text if isinstance(path_or_text, str) else path_or_text.read_text(encoding="utf8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def asked(tmp_path):
    """Questions without answers, of unequal lengths; one has a column of its own, one an answer that is not read."""
    rows = [
        {"question": "Ada: 3\n", "id": 7},
        {"question": "a much longer question than the others\n", "id": 8, "completion": "kept"},
        {"question": "Bo\n", "id": 9, "note": None},
    ]
    return tiny_lm.write_rows(tmp_path / "asked.jsonl", rows)


def test_answers_are_those_of_the_adapter_in_the_rows_order(lorakit, model, trained, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    flags = ["--model", model, "--adapter", trained / "adapter", "--precision", "fp32", "--max-new-tokens", 6]
    code, said, _ = lorakit("predict", asked, *flags, "--out", out, "--batch-size", 2)
    assert code == 0
    assert said == f"3 predictions: {out}\n"
    found, rows = lines(out), lines(asked)
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in found] == rows
    base = load_model(model, lk.load_base(model, dtype="fp32").dtype, "cpu")
    tokenizer = load_tokenizer(model)
    lk.attach(base, lk.Adapter.load(trained / "adapter"))
    for row in found:
        (text,) = generate(base, tokenizer, [tokenizer.encode(row["question"])], max_new_tokens=6)
        assert row["prediction"]["answer"] == text.strip()
    code, said, _ = lorakit("predict", asked, *flags, "--limit", 2)  # to standard output
    assert (code, lines(said)) == (0, found[:2])


def test_a_row_that_asks_nothing_is_named_and_an_existing_file_stays(lorakit, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n")
    bad = tiny_lm.write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": "b" * 200}])
    code, _, error = lorakit("predict", bad, "--model", model, "--out", out)
    assert (code, out.read_text()) == (2, "mine\n")
    assert "exists\n  --force replaces it" in error
    code, _, error = lorakit("predict", bad, "--model", model, "--out", out, "--force", "--max-new-tokens", 6)
    assert code != 0
    assert f"{bad}, row 2 has 200 tokens" in error
    assert out.read_text() == "mine\n"
    none = tiny_lm.write_rows(tmp_path / "none.jsonl", [{"promt": "a"}])
    code, _, error = lorakit("predict", none, "--model", model)
    assert code != 0
    assert "row 1: nothing to answer; columns found: promt; did you mean 'prompt'" in error
    assert "--columns prompt=YOUR_COLUMN" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x.csv"], "lines of JSON"),
        (["--out", "."], "is a folder"),
        (["--column", "question"], "have a column 'question' already"),
        (["--beams", "2", "--temperature", "1"], "--beams 2 searches for the likeliest text"),
        (["--task", "causal-lmm"], "causal_lm"),
        (["--task", "classification", "--beams", "2"], "--beams: the task classification generates no text"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(lorakit, model, asked, flags, said):
    code, _, error = lorakit("predict", asked, "--model", model, *flags)
    assert code != 0
    assert said in error


def test_sampled_answers_are_those_of_the_seed(lorakit, model, asked):
    def sampled(*flags):
        code, said, _ = lorakit("predict", asked, "--model", model, "--max-new-tokens", 6, "--temperature", 1, *flags)
        assert code == 0
        return lines(said)

    assert sampled() == sampled("--seed", 0) != sampled("--seed", 1)


def test_beams_are_transformers_own(lorakit, model, asked):
    import torch
    from transformers import AutoModelForCausalLM

    code, said, _ = lorakit(
        "predict", asked, "--model", model, "--max-new-tokens", 6, "--beams", 3, "--precision", "fp32"
    )
    assert code == 0
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    for row in lines(said):
        ids = torch.tensor([tokenizer.encode(row["question"])])
        made = base.generate(ids, num_beams=3, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :]
        assert row["prediction"]["answer"] == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_prompts_are_turns_where_the_adapter_learnt_conversations(lorakit, tmp_path):
    """As `lorakit generate` asks, with the chat template that the adapter's record has."""
    model = tiny_lm.save(tmp_path / "model")
    template = tmp_path / "chat.jinja"
    template.write_text(tiny_lm.CHATML)
    turns = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in tiny_lm.NAMES
    ]
    data = tiny_lm.write_rows(tmp_path / "turns.jsonl", turns)
    out = tmp_path / "run"
    flags = ["--model", model, "--data", data, "--chat-template", template, "--out", out, "--quiet"]
    assert lorakit("train", *flags, *tiny_lm.FLAGS)[0] == 0
    use = ["--model", model, "--adapter", out / "adapter", "--precision", "fp32", "--max-new-tokens", 5]
    _, answer, _ = lorakit("generate", "Zoe?", *use)
    for row in ({"prompt": "Zoe?"}, {"messages": [{"role": "user", "content": "Zoe?"}]}):
        code, said, error = lorakit("predict", tiny_lm.write_rows(tmp_path / "zoe.jsonl", [row]), *use)
        assert code == 0, error
        assert lines(said)[0]["prediction"]["answer"] == answer.strip()


def test_a_fully_fine_tuned_model_needs_no_adapter(lorakit, model, data, asked, tmp_path):
    out = tmp_path / "run"
    flags = ["--model", model, "--data", data, "--out", out, "--quiet", "--method", "full", *tiny_lm.FLAGS[2:]]
    assert lorakit("train", *flags)[0] == 0
    answers = []
    for each in (model, out / "model"):
        code, said, _ = lorakit("predict", asked, "--model", each, "--precision", "fp32", "--max-new-tokens", 6)
        assert code == 0
        answers.append([row["prediction"]["answer"] for row in lines(said)])
    assert answers[0] != answers[1]
