"""A tiny T5 really learns something small, and is evaluated, asked and merged with what it learnt."""

from __future__ import annotations

import json

import tiny_lm
import tiny_seq

from lorakit.cli import run
from lorakit.train.progress import Progress
from lorakit.train.train import train

QUIET = Progress(quiet=True)


def test_a_tiny_t5_learns_to_fill_slots(make_config, tmp_path, capsys, monkeypatch):
    """72 pairs of a name and a food; 14 pairs are not trained on, and none of them is right before."""
    monkeypatch.setenv("COLUMNS", "200")
    rows, base = tiny_seq.slots(), tiny_seq.save_for_slots(tmp_path / "slots")
    data, test = (
        tiny_lm.write_rows(tmp_path / f"{name}.jsonl", part)
        for name, part in (("train", rows[:58]), ("test", rows[58:]))
    )
    result = train(
        make_config(
            task="seq2seq",
            model=base,
            data=data,
            validation=0,
            steps=200,
            batch_size=16,
            micro_batch=16,
            rank=8,
            save_modules=["shared"],
            learning_rate=1e-2,
            eval_every=200,
            sample_tokens=0,
        ),
        QUIET,
    )
    flags = ["--model", str(base), "--adapter", f"slots={result.adapter}", "--precision", "fp32"]
    capsys.readouterr()
    assert run(["eval", str(test), *flags, "--json"]) == 0
    untuned, tuned = json.loads(capsys.readouterr().out)["results"]
    assert (untuned["adapter"], untuned["scores"]["exact_match"]) == (None, 0)
    assert tuned["scores"]["exact_match"] >= 80
    assert tuned["scores"]["rouge_2"] >= 80
    assert tuned["tokens"] == 14 * 4  # three words and the end
    assert run(["eval", str(test), *flags]) == 0
    assert "ROUGE-2" in capsys.readouterr().out
    assert run(["generate", "food tea name Ada", *flags]) == 0
    assert capsys.readouterr().out == "Ada eats tea\n"
    assert run(["predict", str(test), *flags[:2], "--adapter", str(result.adapter), "--beams", "2"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in answers] == [row["source"] for row in rows[58:]]
    assert sum(row["prediction"]["answer"] == row["target"] for row in answers) >= 11
    assert run(["predict", str(test), "--model", str(base), "--limit", "1"]) == 0
    capsys.readouterr()
    assert run(["merge", str(base), str(result.adapter), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert run(["generate", "food tea name Ada", "--model", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == "Ada eats tea\n"
