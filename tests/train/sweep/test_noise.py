"""Differences over seeds: the paired t-test's interval, and what is said of few seeds, failures and groups."""

from __future__ import annotations

import pytest
from test_sweep_plot import entry

from lorakit.train.sweep import noise

SWEPT = ("variant", "seed")
LOSSES = {"lora": [1.0, 1.2, 1.1, 1.3], "dora": [0.9, 1.12, 1.0, 1.19], "loha": [1.0, 1.1, 1.3, 1.0]}


def runs(losses=LOSSES):
    return [
        entry(f"{variant} {seed}", loss, variant=variant, seed=seed)
        for variant, each in losses.items()
        for seed, loss in enumerate(each)
    ]


def test_the_interval_is_that_of_a_paired_t_test():
    # By hand: the differences to dora are .1, .08, .1, .11; their mean .0975 and deviation .01258; t(3) = 3.182.
    best, second, third = noise.over_seeds(runs(), SWEPT)
    assert (best.settings, best.difference, best.above_noise) == ({"variant": "dora"}, None, None)
    by_name = {each.settings["variant"]: each for each in (second, third)}
    lora, loha = by_name["lora"], by_name["loha"]
    assert lora.difference == pytest.approx(0.0975)
    assert lora.within == pytest.approx(3.182 * 0.0125831 / 2, rel=1e-4)
    assert lora.above_noise
    assert not loha.above_noise  # its mean is as high, but it is not worse with every seed


def test_a_quantile_beyond_the_table_is_the_normal_distributions():
    many = {"a": [float(i % 5) for i in range(40)], "b": [i % 5 + (1.5 if i % 2 else 0.5) for i in range(40)]}
    worse = noise.over_seeds(runs(many), SWEPT)[1]
    assert worse.within == pytest.approx(1.96 * 0.50637 / 40**0.5, rel=1e-3)


def test_one_seed_tells_nothing_and_a_failed_run_is_left_out_and_counted():
    import dataclasses

    single = noise.over_seeds(runs({"lora": [1.0], "dora": [0.9]}), SWEPT)
    assert [each.above_noise for each in single] == [None, None]
    some = runs()
    some[1] = dataclasses.replace(some[1], failed="loss is nan")
    lora = next(each for each in noise.over_seeds(some, SWEPT) if each.settings["variant"] == "lora")
    assert (lora.seeds, lora.failed) == (3, 1)
    assert lora.difference == pytest.approx((0.1 + 0.1 + 0.11) / 3)
    every = [dataclasses.replace(e, failed="nan") if e.settings["variant"] == "loha" else e for e in runs()]
    last = noise.over_seeds(every, SWEPT)[-1]
    assert (last.settings["variant"], last.mean, last.failed) == ("loha", None, 4)
    cells = noise.table(noise.over_seeds(every, SWEPT), SWEPT).cells
    assert [row[-1] for row in cells] == ["best", "worse", "all failed"]


def test_groups_are_compared_within_themselves():
    import dataclasses

    twice = [dataclasses.replace(e, group=g) for g in ("a.jsonl", "b.jsonl") for e in runs()]
    summary = noise.over_seeds(twice, SWEPT)
    assert [each.group for each in summary] == ["a.jsonl"] * 3 + ["b.jsonl"] * 3
    assert summary[:3] == [dataclasses.replace(each, group="a.jsonl") for each in summary[3:]]


@pytest.mark.parametrize("swept", [("variant",), ("seed",)])
def test_without_seeds_beside_other_settings_there_is_nothing_to_compare(swept):
    assert noise.over_seeds(runs(), swept) == []
