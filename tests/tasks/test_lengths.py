"""Rows over the length limit: what they cost is said, and more than 1 % of the tokens is never left out unasked."""

from __future__ import annotations

import pytest
import tiny_lm

from lorakit.cli import run
from lorakit.errors import DataError
from lorakit.tasks import classification
from lorakit.tasks.text.lengths import described
from lorakit.train.config import TrainConfig

CONFIG = TrainConfig(data="rows.jsonl")


@pytest.mark.parametrize("action, lost", [("dropped", "1"), ("cut", "0.5")])
def test_the_share_of_tokens_that_is_lost_is_said(action, lost):
    lengths = [10] * 198 + [20]
    expected = f"at most 10 tokens (why), 1 {action} ({lost} % of the tokens)"
    assert described(lengths, 10, "why", {action: 1}, CONFIG.replace(on_long="cut")) == expected
    assert described(lengths, 20, "why", {action: 0}, CONFIG) == "at most 20 tokens (why)"
    assert described(lengths, 10, "why", {"split": 1}, CONFIG) == "at most 10 tokens (why), 1 split"


def test_more_than_one_percent_asks_for_on_long():
    lengths = [10] * 90 + [30]
    with pytest.raises(DataError, match=r"3.2% of all tokens\n.*on_long: drop or on_long: cut.*longest row has 30"):
        described(lengths, 10, "why", {"dropped": 1}, CONFIG)
    assert "3.2 %" in described(lengths, 10, "why", {"dropped": 1}, CONFIG.replace(on_long="drop"))


@pytest.fixture
def long_rows(tmp_path):
    rows = [{"prompt": f"{i:02}", "completion": "b"} for i in range(100)] + [{"prompt": "c", "completion": "b" * 60}]
    return str(tiny_lm.write_rows(tmp_path / "rows.jsonl", rows))


def test_a_run_asks_too_and_the_command_line_says_the_flag(tmp_path, long_rows, capsys):
    model = str(tiny_lm.save(tmp_path / "model"))
    args = ["train", "--model", model, "--data", long_rows, "--out", str(tmp_path / "run"), *tiny_lm.FLAGS]
    assert run([*args, "--quiet"]) == 1
    assert "--on-long drop or --on-long cut, or raise --max-length" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run([*args, "--on-long", "cut"]) == 0
    assert "1 cut (" in capsys.readouterr().out


def test_classification_asks_too(tmp_path):
    model = str(tiny_lm.save(tmp_path / "model"))
    rows = [{"text": "a" * (80 if i == 0 else 4), "label": str(i % 2)} for i in range(100)]
    data = str(tiny_lm.write_rows(tmp_path / "rows.jsonl", rows))
    config = TrainConfig(data=data, model=model, task="classification", max_length=8)
    with pytest.raises(DataError, match="would be cut"):
        classification.data(config, classification.processor(config))
    config = config.replace(on_long="cut")
    facts = dict(classification.data(config, classification.processor(config)).facts)
    assert any("1 cut" in fact for fact in facts.values())
