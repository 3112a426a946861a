"""What each table says of the paper, on figures made so that it must say each of its verdicts."""

from __future__ import annotations

import json

import pytest

from lorakit.experiments import address, amplification, e2e, few_data, gpt3, latency, matrices, memory, ranks, subspaces

LOW, SAME, HIGH = [1.0, 1.1, 1.2], [1.001, 1.102, 1.203], [2.0, 2.1, 2.201]  # by seed, so the differences are sharp
UNSURE = [0.5, 1.1, 1.9]  # differs from LOW by -0.5 to 0.7


def verdicts(table, result):
    """The verdicts by the claim's first words, which tell a table's claims apart; the result must be plain data."""
    return [finding.verdict for finding in table.findings(json.loads(json.dumps(result)))]


@pytest.mark.parametrize("losses, said", [(SAME, "agrees"), (HIGH, "disagrees"), (UNSURE, "within noise")])
def test_ranks(losses, said):
    def result(**other):
        own = dict.fromkeys(map(str, ranks.RANKS), LOW) | other
        return {"rows": [{"rank": int(rank), "losses": values} for rank, values in own.items()]}

    assert verdicts(ranks, result(**{"1": losses})) == [said, "agrees", said]
    better = {"agrees": SAME, "disagrees": [0.5, 0.6, 0.701], "within noise": UNSURE}[said]
    assert verdicts(ranks, result(**{"64": better})) == ["agrees", said, said]


def test_two_seeds_that_vary_show_no_rank_to_be_enough():
    rows = [{"rank": rank, "losses": [1.0, 1.1]} for rank in ranks.RANKS]
    rows[0]["losses"] = [1.5, 3.5]
    assert verdicts(ranks, {"rows": rows})[0] == "within noise"


def test_matrices():
    def result(**other):
        own = dict.fromkeys([*matrices.ATTENTION, *matrices.MLP], HIGH) | other
        return {"rows": [{"name": name, "losses": values} for name, values in own.items()]}

    all_four = matrices.ALL_FOUR
    assert verdicts(matrices, result()) == ["within noise"] * 3 + ["agrees"]
    right = {all_four: LOW, "q, v": LOW, "v": [1.5, 1.6, 1.701]}
    assert verdicts(matrices, result(**right)) == ["agrees"] * 4
    one_ahead = {**right, "v": [0.1, 0.2, 0.301], "down": [0.1, 0.2, 0.301]}
    assert verdicts(matrices, result(**one_ahead)) == ["disagrees", "agrees", "agrees", "disagrees"]
    other_way = {"q, k": LOW, "q": LOW, "down": UNSURE, all_four: LOW}
    assert verdicts(matrices, result(**other_way)) == ["within noise", "disagrees", "disagrees", "within noise"]


def methods(**losses):
    named = {name.replace("_", " "): values for name, values in losses.items()}
    return {"rows": [{"name": n, "reason": "", "trainable": 9, "losses": v} for n, v in named.items()]}


@pytest.mark.parametrize("full, said", [(SAME, "agrees"), ([0.1, 0.2, 0.301], "disagrees"), (UNSURE, "within noise")])
def test_lora_is_as_good_as_full_fine_tuning_only_within_the_margin(full, said):
    result = methods(full=full, **{e2e.REFERENCE: LOW, e2e.LARGEST: LOW})
    assert verdicts(e2e, result) == [said, said]


@pytest.mark.parametrize("other", e2e.EQUALS)
def test_each_method_is_compared_with_the_lora_of_its_own_size_alone(other):
    best = {"LoRA all r 16": LOW, "LoRA q,v r 4 + prefix": LOW, "LoRA q,v r 4": LOW}  # none of them may decide
    both = verdicts(e2e, methods(**best))
    own = e2e.EQUALS[other]
    for losses, said in ((LOW, "agrees"), ([3.0, 3.1, 3.201], "disagrees"), ([1.5, 2.1, 2.9], "within noise")):
        assert verdicts(e2e, methods(**best, **{own: losses, other: HIGH})) == [said, *both]


def test_the_loras_compared_have_about_the_parameters_of_the_other_methods():
    from lorakit.experiments.runs import trainable
    from lorakit.train.config import TrainConfig

    sizes = {n: trainable(TrainConfig(data="-", **e2e.METHODS[n])) for n in {*e2e.EQUALS, *e2e.EQUALS.values()}}
    for other, own in e2e.EQUALS.items():
        assert sizes[own] / sizes[other] == pytest.approx(1, abs=0.25), (other, sizes)


def test_lora_with_a_prefix_is_judged_against_the_same_lora():
    def said(both):
        return verdicts(e2e, methods(**{e2e.BOTH: both, e2e.REFERENCE: HIGH}))

    assert said(LOW) == ["agrees"]
    assert said([3.0, 3.1, 3.201]) == ["disagrees"]
    assert said([1.5, 2.1, 2.9]) == ["within noise"]


def test_few_data():
    def result(few, prefix):
        own = {few_data.FULL: LOW, few_data.LORA: few, "prefix": prefix}
        rows = [{"name": n, "rows": size, "losses": v} for n, v in own.items() for size in few_data.SIZES]
        return {"rows": rows}

    assert verdicts(few_data, result(SAME, HIGH)) == ["agrees"] * 3
    assert verdicts(few_data, result(HIGH, SAME)) == ["disagrees"] * 3
    assert verdicts(few_data, result(UNSURE, LOW)) == ["within noise"] * 3


def counted(**changed):
    """GPT-3's figures as in the paper, with 16 bits: 6 bytes a parameter for training and 2 for the checkpoint."""
    own = {"base": 200e9, "lora": 20e6, "full": 1.2e12, "memory": 350e9, "checkpoint": 35e6, "rank 1": 4.7e6} | changed
    return {
        "rows": [{"model": gpt3.GPT3, "name": "LoRA q,v r 1", "counted": own["rank 1"], "paper": 4.7e6}],
        "base": own["base"],
        "lora": own["lora"],
        "memory": [{"precision": "16", "full": own["full"], "lora": own["memory"]}],
        "checkpoints": {"full": 350e9, "lora": own["checkpoint"]},
    }


def test_gpt3_is_judged_by_ratio():
    assert verdicts(gpt3, counted()) == ["agrees"] * 5
    wrong = ({"base": 100e9}, {"checkpoint": 70e6}, {"memory": 500e9}, {"full": 1.4e12}, {"rank 1": 5.1e6})
    for place, change in enumerate(wrong):
        expected = ["agrees"] * 5
        expected[place] = "disagrees"
        assert verdicts(gpt3, counted(**change)) == expected, change


def test_memory():
    def result(lora_adam, lora_activations, measured=1.0):
        parts = {"weights": 100, "gradients": 100, "Adam": 200, "activations": 100}
        low = {"weights": 100, "gradients": 1, "Adam": lora_adam, "activations": lora_activations}
        sides = {"full": parts, "LoRA, q and v, r 4": low}
        rows = [
            {"name": n, "predicted": p, "measured": {k: v * measured for k, v in p.items()}} for n, p in sides.items()
        ]
        return {"rows": rows}

    assert verdicts(memory, result(2, 90)) == ["agrees"] * 3
    assert verdicts(memory, result(100, 10, 1.5)) == ["disagrees"] * 3


def test_latency():
    def result(merged, unmerged, first, last):
        sides = ((1, first), (32, last))
        return {
            "rows": [
                {"batch": batch, "length": 64, latency.MERGED: merged}
                | dict.fromkeys(latency.ADAPTERS, adapters)
                | dict.fromkeys(latency.UNMERGED, unmerged)
                for batch, adapters in sides
            ]
        }

    assert verdicts(latency, result(1.0, 8.0, 20.0, 0.5)) == ["agrees"] * 4
    assert verdicts(latency, result(1.0, 8.0, 20.0, 5.0))[2] == "disagrees"
    assert verdicts(latency, result(9.0, 8.0, 7.0, 5.0)) == ["disagrees", "within noise", "agrees", "within noise"]


def amplified(in_delta, in_w=8.0, norms=(16.0, 10.0)):
    """Rows of ranks 4 and 64; random directions have 0.5 and 8 of W in them."""
    sides = zip(amplification.RANKS, (in_delta, 9.0), (0.5, 8.0), norms, strict=True)
    return {
        "rows": [
            {"module": kind, "rank": rank, "in_delta": own, "in_w": in_w, "in_random": chance, "norm_w": 30.0}
            | {"norm_delta": norm, "factor": norm / own}
            for rank, own, chance, norm in sides
            for kind in amplification.KINDS
        ]
    }


def test_an_amplification_that_random_directions_have_too_shows_nothing():
    assert verdicts(amplification, amplified(0.55)) == ["not shown"] * 3
    assert verdicts(amplification, amplified(2.0)) == ["agrees"] * 3
    assert verdicts(amplification, amplified(2.0, in_w=3.0)) == ["agrees", "disagrees", "agrees"]
    assert verdicts(amplification, amplified(2.0, norms=(1.0, 20.0))) == ["agrees", "agrees", "disagrees"]


def grids(ranks_first, ranks_rest, seeds_q, seeds_v, chance=0.03):
    def grid(first, rest):
        return [[first] + [max(first, rest)] * 7] + [[rest] * 8] * 7

    pairs = dict(zip(subspaces.PAIRS, [(ranks_first, ranks_rest), None, (chance, chance)], strict=True))
    found = {f"{pair}, A": dict.fromkeys(subspaces.KINDS, grid(*own)) for pair, own in pairs.items() if own}
    seeds = dict(zip(subspaces.KINDS, (grid(seeds_q, seeds_q), grid(seeds_v, seeds_v)), strict=True))
    return {"grids": found | {f"{subspaces.PAIRS[1]}, {of}": seeds for of in subspaces.OF}}


def test_subspaces():
    assert verdicts(subspaces, grids(0.9, 0.2, 0.5, 0.3)) == ["agrees"] * 4
    assert verdicts(subspaces, grids(0.1, 0.4, 0.3, 0.5)) == ["disagrees", "disagrees", "agrees", "disagrees"]
    assert verdicts(subspaces, grids(0.9, 0.2, 0.05, 0.04))[2] == "not shown"


def test_address():
    def result(exact, adapter, off):
        return {"rows": [{"exact": exact, "e2e": {"base": 3.5, "adapter": adapter, "off": off}}]}

    assert verdicts(address, result(0.8, 3.55, 3.5)) == ["agrees"] * 3
    assert verdicts(address, result(0.0, 8.5, 3.6)) == ["not shown", "disagrees", "disagrees"]
