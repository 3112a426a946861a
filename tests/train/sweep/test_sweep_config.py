"""A sweep's settings: which lists are values, the product of them, names, and what cannot be swept."""

from __future__ import annotations

import pytest
import yaml

from lorakit.errors import ConfigError
from lorakit.train.config import TrainConfig
from lorakit.train.sweep.sweep_config import NOT_SWEPT, expand, names, short


def of(**values):
    return expand({"data": "rows.jsonl"} | values)


def test_the_runs_are_the_product_and_each_has_a_short_name_and_a_folder():
    plan = of(rank=[4, 16], learning_rate=["1e-4", 2e-4], out="here")
    assert list(plan.runs) == ["rank=4,lr=1e-4", "rank=4,lr=2e-4", "rank=16,lr=1e-4", "rank=16,lr=2e-4"]
    config = plan.runs["rank=16,lr=1e-4"]
    assert (config.rank, config.learning_rate, config.out, config.sample_tokens) == (
        16,
        1e-4,
        "here/runs/rank=16,lr=1e-4",
        0,
    )
    assert plan.values_of("rank=16,lr=1e-4") == {"rank": 16, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    "given, values",
    [
        (["all-linear", ["q_proj", "v_proj"]], ["all-linear", ["q_proj", "v_proj"]]),
        ([["q_proj"], ["v_proj"]], [["q_proj"], ["v_proj"]]),
        (["all-linear"], ["all-linear"]),
        (["attention", "kohya"], ["attention", "kohya"]),
    ],
)
def test_a_list_setting_is_swept_by_a_list_of_lists(given, values):
    assert [config.targets for config in of(targets=given).runs.values()] == values


def test_a_plain_list_of_a_list_setting_is_one_value():
    plan = of(targets=["q_proj", "v_proj"], layers=[0, 1], rank=[1, 2])
    assert plan.swept == ("rank",)
    assert all(config.targets == ["q_proj", "v_proj"] and config.layers == [0, 1] for config in plan.runs.values())
    assert len(of(layers=[[0, 1], [2], None]).runs) == 3
    assert len(of(rank_pattern=[{}, {"q_proj": 4}]).runs) == 2
    assert len(of(data=["a.jsonl", "b.jsonl"], rslora=[True, False]).runs) == 4


def test_the_written_settings_read_back_as_the_same_sweep():
    plan = of(rank=[4, 8], targets=["all-linear", ["v_proj", "q_proj"]], learning_rate=["auto", "3e-4"], exclude=["x"])
    again = expand(yaml.safe_load(yaml.safe_dump(dict(plan.settings))))
    assert (again.settings, again.swept, again.runs) == (plan.settings, ("rank", "targets", "learning_rate"), plan.runs)


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "nothing to sweep.*\n.*lorakit train"),
        ({"rank": 4}, "nothing to sweep"),
        ({"rank": {"a": 1}}, "TrainConfig.rank"),
        (
            {"targets": ["q_proj", "v_proj"]},
            r"nothing to sweep.*targets is a list itself: \[\[...\], \[...\]\] sweeps it",
        ),
        ({"rank": [4, 8], "memory": "1GB"}, "not estimated"),
        ({"rnk": [4, 8]}, "no setting 'rnk'; did you mean 'rank'"),
        ({"rank": [4, 0]}, "TrainConfig.rank"),
        ({"rank": ["many", 4]}, "TrainConfig.rank"),
        ({"rank": []}, "rank: the list is empty"),
        ({"rank": [4, 8, 4]}, "rank: 4 is listed twice"),
        ({"learning_rate": ["1e-4", 0.0001]}, "learning_rate: 0.0001 is listed twice"),
        (
            {"rank": list(range(1, 10)), "seed": list(range(9))},
            r"81 runs \(9 \(rank\) x 9 \(seed\)\) are more than 64\n.*--max-runs 81",
        ),
        ({"model": ["a", "b"]}, "model cannot be swept: all runs train on one base"),
        ({"precision": ["fp32", "bf16"]}, "precision cannot be swept"),
        ({"gradient_checkpointing": [True, False]}, "one forward pass"),
        ({"out": ["a", "b"]}, "out cannot be swept"),
        ({"seed": [4, 8], "method": "full"}, "method: full fine-tuning"),
        ({"rank": [4, 8], "save_modules": ["norm"]}, "save_modules"),
        ({"rank": [4, 8], "bias": "all"}, "bias: all"),
        ({"rank": [4, 8], "track": ["wandb"]}, "wandb"),
        ({"rank": [4, 8], "find_lr": True}, "find_lr"),
    ],
)
def test_what_is_no_sweep_is_said(values, message):
    with pytest.raises(ConfigError, match=message):
        of(**values)


def test_the_limit_on_runs_can_be_raised():
    assert len(expand({"data": "x", "seed": list(range(70))}, max_runs=70).runs) == 70


def test_the_settings_that_cannot_be_swept_are_settings():
    assert set(NOT_SWEPT) <= set(TrainConfig.model_fields)


def test_names_are_short_and_fit_for_folders_and_unlike_each_other():
    assert names([{"learning_rate": 3e-5}, {"learning_rate": 0.5}, {"learning_rate": "auto"}]) == [
        "lr=3e-5",
        "lr=0.5",
        "lr=auto",
    ]
    assert short("some/where/my rows (1).jsonl") == "my_rows_1"
    assert short(["q_proj", "v_proj"]) == "q_proj+v_proj"
    assert short({"q_proj": 4}) == "q_proj-4"
    assert (short(True), short(None), short([]), short("..")) == ("true", "none", "none", "_")
    assert (short(1e-4), short(12500.0), short(0.00025)) == ("1e-4", "12500", "2.5e-4")
    assert names([{"data": "训练.jsonl"}, {"data": "数据.jsonl"}]) == ["data=训练", "data=数据"]
    assert len(short("数" * 100).encode()) <= 41
    two = names([{"data": "a/rows.jsonl"}, {"data": "b/rows.jsonl"}])
    assert two[0] == "data=rows"
    assert two[1].startswith("data=rows~")
    long = names([{"targets": [f"layer{i}" for i in range(n)]} for n in (80, 81)])
    assert len(set(long)) == 2
    assert all(len(name) < 140 and "/" not in name for name in long)


def test_short_names_of_variants_are_swept_beside_kinds_and_keep_their_names():
    plan = of(variant=["lora", "loha", "pissa", "rslora"], seed=[0, 1])
    pissa, rslora = (plan.runs[f"variant={name},seed=1"] for name in ("pissa", "rslora"))
    assert (pissa.variant, pissa.init, pissa.rslora) == ("lora", "pissa", False)
    assert (rslora.variant, rslora.init, rslora.rslora) == ("lora", "default", True)
    assert plan.values_of("variant=pissa,seed=1") == {"variant": "pissa", "seed": 1}
    again = expand(yaml.safe_load(yaml.safe_dump(dict(plan.settings))))
    assert again == plan


def test_a_setting_of_one_kind_is_for_its_runs_only_and_without_such_runs_an_error():
    plan = of(variant=["lora", "lora_fa"], lora_plus=8.0)
    assert [config.lora_plus for config in plan.runs.values()] == [8.0, None]
    plan = of(variant=["lora", "eva"], eva_rho=1.5)
    assert [run.eva_rho for run in plan.runs.values()] == [2.0, 1.5]
    assert expand(dict(plan.settings)) == plan
    with pytest.raises(ConfigError, match="eva_rho has an effect with init='eva' only"):
        of(variant=["lora", "loha"], eva_rho=1.5)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"variant": ["lora", "pissa"], "init": ["default", "olora"]},
            "the run variant=pissa,init=olora: .*stands for",
        ),
        ({"variant": ["lora", "lora_plus"], "lora_plus": [4.0, 8.0]}, "the run .*variant=lora_plus.*stands for"),
        (
            {"variant": ["lora", "adalora"], "adalora_rank": [4, 8]},
            "the run .*variant=lora.*adalora_rank has an effect",
        ),
    ],
)
def test_a_combination_that_is_not_sound_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        of(**values)


def test_a_setting_of_one_kind_can_be_swept():
    plan = of(variant="adalora", adalora_rank=[4, 8])
    assert [run.adalora_rank for run in plan.runs.values()] == [4, 8]
