"""Rows are as long as the base has positions for, less virtual tokens: in training, evaluation and prediction alike."""

from __future__ import annotations

import json

import pytest
import tiny_lm

from lorakit.bases.positions import usable_positions
from lorakit.errors import ConfigError
from lorakit.tasks.text.positions import positions_for
from lorakit.train.config import TrainConfig

USABLE = 16
VIRTUAL = 4


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A base whose table of positions begins after the padding token's id, as RoBERTa's 514 rows for 512 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = USABLE + tiny_lm.PAD + 1
    config = RobertaConfig(vocab_size=258, max_position_embeddings=rows, pad_token_id=tiny_lm.PAD, **sizes)
    return tiny_lm.save(tmp_path_factory.mktemp("roberta"), RobertaForSequenceClassification(config))


def texts(path, *lengths):
    return tiny_lm.write_rows(path, [{"text": "ab"[i % 2] * n, "label": "xy"[i % 2]} for i, n in enumerate(lengths)])


def test_models_with_positions_after_their_padding(roberta):
    from transformers import AutoConfig, BertConfig, T5Config

    assert usable_positions(AutoConfig.from_pretrained(roberta)) == USABLE
    assert usable_positions(BertConfig()) == 512
    assert usable_positions(T5Config()) is None  # relative


def test_the_runs_virtual_tokens_take_positions(roberta):
    config = TrainConfig(data="rows.jsonl", model=str(roberta), task="classification")
    assert positions_for(config) == USABLE
    virtual = config.replace(method="prompt", virtual_tokens=VIRTUAL)
    assert positions_for(virtual) == USABLE - VIRTUAL
    assert positions_for(virtual, tokens=VIRTUAL) == USABLE - VIRTUAL  # attached already, and not twice
    assert positions_for(config, tokens=VIRTUAL) == USABLE - VIRTUAL
    with pytest.raises(ConfigError, match=r"16 positions, and 16 virtual tokens leave none .*\n.* 15 virtual tokens"):
        positions_for(config.replace(method="prompt", virtual_tokens=USABLE))


def test_a_roberta_at_its_limit_and_one_above(lorakit, roberta, tmp_path):
    data = texts(tmp_path / "train.jsonl", *[USABLE] * 4)
    flags = ["--model", roberta, "--data", data, "--task", "classification", *tiny_lm.FLAGS, "--steps", "1"]
    code, _, error = lorakit("train", *flags, "--out", tmp_path / "long", "--max-length", USABLE + 1)
    assert code != 0
    assert (
        f"max-length: {USABLE + 1} is more than the {USABLE} positions of {roberta}\n  give {USABLE} or less" in error
    )
    assert "rope" not in error  # learned positions do not scale
    code, _, error = lorakit("train", *flags, "--out", tmp_path / "run", "--max-length", USABLE)
    assert code == 0, error
    longer = texts(tmp_path / "longer.jsonl", USABLE, USABLE + 1, 42)
    use = ["--model", roberta, "--adapter", tmp_path / "run" / "adapter"]
    code, printed, error = lorakit("predict", longer, *use)
    assert code == 0, error
    cut = texts(tmp_path / "cut.jsonl", USABLE, USABLE, USABLE)
    _, of_cut, _ = lorakit("predict", cut, *use)
    found, expected = ([json.loads(line)["prediction"] for line in each.splitlines()] for each in (printed, of_cut))
    assert found == expected
    code, printed, error = lorakit("eval", longer, *use, "--json")
    assert code == 0, error
    assert json.loads(printed)["results"] == json.loads(lorakit("eval", cut, *use, "--json")[1])["results"]


def test_a_prefix_leaves_fewer_positions_to_evaluate(lorakit, model, tmp_path):
    data = texts(tmp_path / "train.jsonl", *[8] * 4)
    flags = ["--model", model, "--data", data, "--task", "classification", *tiny_lm.FLAGS[2:], "--steps", "1"]
    own = ["--method", "prefix", "--virtual-tokens", VIRTUAL, "--out", tmp_path / "run"]
    code, _, error = lorakit("train", *flags, *own)
    assert code == 0, error
    use = ["--model", model, "--adapter", tmp_path / "run" / "adapter"]
    longer, cut = (
        texts(tmp_path / f"{room}.jsonl", *[tiny_lm.POSITIONS - room] * 2) for room in (VIRTUAL - 1, VIRTUAL)
    )
    results = []
    for rows in (longer, cut):
        code, printed, error = lorakit("eval", rows, *use, "--json")
        assert code == 0, error
        results.append(json.loads(printed)["results"])
        assert lorakit("predict", rows, *use)[0] == 0
    assert results[0] == results[1]
