"""What a training run can be told, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.methods.lora import adapter_config
from lorakit.train.config import TrainConfig


def test_only_the_data_has_to_be_given():
    config = TrainConfig(data="rows.jsonl")
    assert (config.model, config.rank, config.alpha, config.batch_size) == ("embedded", 16, 32, 16)
    with pytest.raises(ConfigError, match=r"TrainConfig\.data: field required"):
        TrainConfig()


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="no setting 'learning_rat'; did you mean 'learning_rate'"):
        TrainConfig(data="x", learning_rat=1e-3)


def test_every_setting_survives_yaml():
    config = TrainConfig(
        data="x",
        learning_rate=2e-5,
        targets=["v_proj", "q_proj"],
        rank_pattern={"q_proj": 8},
        packed={"c_attn": [True, False, True]},
        sample_prompts=["a, b"],
        validation="held.jsonl",
        columns={"prompt": "question"},
        layers=[0, 3],
        steps=7,
    )
    assert TrainConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


def test_numbers_written_as_yaml_writes_them_are_read():
    """PyYAML takes 2e-4, which has no point, for a word."""
    config = TrainConfig(data="x", **yaml.safe_load("{learning_rate: 2e-4, validation: 0, max_length: 64}"))
    assert (config.learning_rate, config.validation, config.max_length) == (2e-4, 0, 64)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", "fast"),
        ("learning_rate", float("nan")),
        ("micro_batch", 0),
        ("max_length", -1),
        ("eval_every", 0),
        ("save_every", 0.5),
        ("threads", 0),
        ("threads", "many"),
        ("validation", 1.0),
        ("validation", -0.1),
        ("epochs", 0),
        ("epochs", float("inf")),
        ("steps", 0),
        ("batch_size", 0),
        ("warmup", 1.5),
        ("beta2", 1.0),
        ("clip", float("nan")),
        ("weight_decay", float("inf")),
        ("patience", -1),
        ("keep", 0),
        ("precision", "int8"),
        ("method", "qlora"),
        ("schedule", "step"),
        ("track", ["mlflow"]),
        ("seed", -1),
        ("seed", 1 << 31),
        ("base", "gpt2"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError) as error:
        TrainConfig(data="x", **{setting: value})
    assert setting in str(error.value)


def test_what_travels_with_the_adapter_is_the_lora_part():
    config = TrainConfig(data="x", model="some/base", rank=8, targets=["q_proj"], learning_rate=1.0, dropout=0.1)
    lora = adapter_config(config, "CAUSAL_LM")
    assert type(lora) is LoraConfig
    assert (lora.base, lora.task, lora.rank, lora.targets, lora.dropout) == (
        "some/base",
        "CAUSAL_LM",
        8,
        ["q_proj"],
        0.1,
    )


def test_every_setting_says_what_it_does():
    assert all(info.description and len(info.description) > 8 for info in TrainConfig.model_fields.values())
