"""Files as public data sets come, trained, evaluated and predicted from the command line without naming the task."""

from __future__ import annotations

import json

import tiny_lm

from lorakit.cli import run

# Made here; the form is that of TREC's, CoLA's, MRPC's and STS-B's files.
FLAGS = [*tiny_lm.FLAGS[:-2], "--learning-rate", "1e-3"]


def trained(capsys, folder, data, *columns):
    assert run(["train", "--data", str(data), "--model", str(folder), "--out", f"{data}-run", *columns, *FLAGS]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())  # the panel's lines joined


def evaluated(capsys, folder, data, *columns, adapter=None):
    assert (
        run(
            [
                "eval",
                str(data),
                "--model",
                str(folder),
                "--adapter",
                f"{adapter or data}-run/adapter",
                *columns,
                "--json",
            ]
        )
        == 0
    )
    return json.loads(capsys.readouterr().out)


def predicted(capsys, folder, data, *columns, adapter=None):
    assert (
        run(["predict", str(data), "--model", str(folder), "--adapter", f"{adapter or data}-run/adapter", *columns])
        == 0
    )
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_trecs_lines(model_folder, tmp_path, capsys):
    data = tmp_path / "questions.label"
    lines = [f"{['HUM:ind Who is', 'LOC:city Where is'][i % 2]} {name}ñ ?" for i, name in enumerate(tiny_lm.NAMES)]
    data.write_bytes("\n".join(lines).encode("latin-1"))
    told = trained(capsys, model_folder, data)
    assert "classification: predict a label for a text or a pair of texts (the rows have text, label, fine)" in told
    assert "2 labels: HUM, LOC" in told
    assert "12 rows: columns that are not used: fine" in told
    (row,) = evaluated(capsys, model_folder, data)["results"]
    assert {"loss", "accuracy", "macro_f1", "matthews"} < row.keys()
    found = predicted(capsys, model_folder, data)
    assert [each["text"] for each in found] == [line.partition(" ")[2] for line in lines]
    assert all(each["prediction"]["label"] in ("HUM", "LOC") for each in found)


def test_a_table_without_a_header_and_with_quotes(model_folder, tmp_path, capsys):
    """CoLA's, and a file with a header to predict, which has other columns."""
    data = tmp_path / "train.tsv"
    data.write_text("".join(f'x\t{i % 2}\t\t"{n}," said {n}.\n' for i, n in enumerate(tiny_lm.NAMES)))
    columns = ["--columns", "text=4,label=2"]
    assert "2 labels: 0, 1" in trained(capsys, model_folder, data, *columns)
    assert evaluated(capsys, model_folder, data, *columns)["task"] == "classification"
    test = tmp_path / "test.tsv"
    test.write_text("index\tsentence\n0\tBo sat.\n1\tCy sat.\n")
    found = predicted(capsys, model_folder, test, "--columns", "text=sentence", adapter=data)
    assert [each["sentence"] for each in found] == ["Bo sat.", "Cy sat."]


def test_a_header_that_is_read_as_a_row_is_an_error(model_folder, tmp_path, capsys):
    data = tmp_path / "a.tsv"
    data.write_text("label\tsentence\n" + "".join(f"{i % 2}\t{n}\n" for i, n in enumerate(tiny_lm.NAMES)))
    flags = ["--data", str(data), "--model", str(model_folder), "--columns", "text=2,label=1", "--out", f"{data}-run"]
    assert run(["train", *flags]) == 1
    assert "its label 'label' occurs in no other row" in capsys.readouterr().err


def test_a_txt_table_of_pairs_with_a_byte_order_mark(model_folder, tmp_path, capsys):
    data = tmp_path / "pairs.txt"
    lines = [f'{i % 2}\t1\t2\t{n} said "so".\t"So", said {n}.' for i, n in enumerate(tiny_lm.NAMES)]
    data.write_text("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "\n".join(lines), encoding="utf8")
    told = trained(capsys, model_folder, data, "--columns", "text=#1 String,text_pair=#2 String,label=Quality")
    assert "shape text, text_pair, label" in told


def test_scores_of_pairs_are_regression(model_folder, tmp_path, capsys):
    data = tmp_path / "train.tsv"
    data.write_text("".join(f"{i}\tA {n}\tThe {n}\t{i % 5}.200\n" for i, n in enumerate(tiny_lm.NAMES)))
    columns = ["--columns", "text=2,text_pair=3,label=4"]
    assert "regression" in trained(capsys, model_folder, data, *columns)
    found = evaluated(capsys, model_folder, data, *columns)
    assert found["task"] == "regression"
    assert {"loss", "pearson", "spearman"} < found["results"][0].keys()
    assert isinstance(predicted(capsys, model_folder, data, *columns)[0]["prediction"]["value"], float)
    assert run(["card", f"{data}-run"]) == 0
    assert ", num_labels=1)" in "".join((tmp_path / "train.tsv-run/adapter/README.md").read_text().split("\n"))


def test_squads_file_is_question_answering(model_folder, tmp_path, capsys):
    """The card has the names by which Llama's class for it finds its trunk."""
    data = tmp_path / "train.json"
    paragraphs = [
        {
            "context": f"{name} sees tea.",
            "qas": [{"question": "Who?", "id": name, "answers": [{"text": name, "answer_start": 0}]}],
        }
        for name in tiny_lm.NAMES
    ]
    data.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    told = trained(capsys, model_folder, data)
    assert (
        "question_answering: find the answer to a question in a text (the rows have id, title, question, context"
        in told
    )
    assert "12 questions in 12 windows" in told
    (row,) = evaluated(capsys, model_folder, data)["results"]
    assert {"loss", "exact_match", "answer_f1"} < row.keys()
    found = predicted(capsys, model_folder, data)
    assert len(found) == 12
    assert found[3]["prediction"]["answer"] in found[3]["context"]
    assert run(["card", f"{data}-run"]) == 0
    page = (tmp_path / "train.json-run/adapter/README.md").read_text()
    assert r"""key_mapping={"^model\\.": "transformer."}""" in page
