"""The figures of the paper's experiments against values counted by hand, and what is said of them."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.lora import Factors
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.experiments import amplification, e2e, few_data, gpt3, subspaces, suite
from lorakit.experiments.nist import nist
from lorakit.experiments.seeds import difference, show


def test_a_paired_difference_is_judged_by_its_interval():
    # d = 0.1, 0.2, 0.3: mean 0.2, deviation 0.1; Student's t for two degrees of freedom is 4.303
    own = difference([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert own.mean == pytest.approx(0.2)
    assert own.within == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert not own.above_noise
    assert "(noise)" in own.show()
    sure = difference([1.1, 2.1, 3.1001], [1.0, 2.0, 3.0])
    assert sure.above_noise


def test_one_seed_says_nothing_about_noise():
    assert not difference([1.0], [2.0]).above_noise
    assert difference([1.0], [2.0]).show() == "-1.0000 (one seed)"
    assert show([1.25], 2) == "1.25"
    assert show([1.0, 3.0], 1) == "2.0 ± 1.4"


@pytest.mark.parametrize(
    "model, name, by_hand",
    [
        ("RoBERTa base", "LoRA q,v r 8", 12 * 2 * 8 * (768 + 768)),
        ("GPT-2 medium", "LoRA q,v r 4", 24 * 2 * 4 * (1024 + 1024)),
        (gpt3.GPT3, "LoRA q,v r 8", 96 * 2 * 8 * (12288 + 12288)),
        (gpt3.GPT3, "adapter H, size 8", 96 * 2 * (2 * 12288 * 8 + 12288 + 8)),
        # q, k, v, o: 3 + 1 biases of the width, 4 + 1 in the MLP, 2 in the norms, and the last norm's
        (gpt3.GPT3, "BitFit", 96 * 11 * 12288 + 12288),
    ],
)
def test_counted_parameters_are_those_of_the_formula(model, name, by_hand):
    case = next(case for case in gpt3.CASES if (case.model, case.name) == (model, name))
    assert gpt3.count(case) == by_hand


def test_gpt3s_parameters_are_those_of_its_shape():
    d, layers = 12288, 96
    by_hand = (50257 + 2048) * d + layers * (12 * d * d + 13 * d) + 2 * d
    case = next(case for case in gpt3.CASES if (case.model, case.name) == (gpt3.GPT3, "full"))
    assert gpt3.count(case) == by_hand


def adapters(*factors):
    """Adapters of one q and one v module each, from (A, B)."""
    kinds = ["q_proj", "v_proj"]
    return [
        Adapter(
            LoraConfig(rank=A.shape[0], targets=kinds),
            {f"layers.0.{kind}": Factors(A, B, float(A.shape[0])) for kind in kinds},
        )
        for A, B in factors
    ]


def test_similarity_of_equal_and_of_orthogonal_directions():
    # unequal singular values, so that the directions are known: the unit vectors
    small = torch.diag(torch.tensor([3.0, 2.0])) @ torch.eye(2, 8)
    same = torch.diag(torch.tensor([5.0, 4.0, 1.0])) @ torch.eye(3, 8)
    apart = torch.diag(torch.tensor([5.0, 4.0, 1.0])) @ torch.eye(8)[4:7]
    one, two, three = adapters((small, torch.eye(6, 2)), (same, torch.eye(6, 3)), (apart, torch.eye(6, 3)))
    grids = subspaces.similarities(one, three, two)
    equal = grids["ranks 8 and 64, A"]["q_proj"]
    assert subspaces.phi(equal, 1, 1) == pytest.approx(1)
    assert subspaces.phi(equal, 2, 3) == pytest.approx(1)  # contained
    assert subspaces.phi(equal, 2, 1) == pytest.approx(1)  # over min(i, j)
    assert subspaces.phi(grids["two seeds of rank 64, A"]["v_proj"], 3, 3) == pytest.approx(0)


def test_random_subspaces_have_their_chance_in_common():
    from lorakit.analysis.compare import similarity

    grid = similarity(*subspaces.random_directions(64, 16, 0))
    assert float(grid[-1, -1]) == pytest.approx(16 / 64, abs=0.1)


def test_the_amplification_of_a_known_update(monkeypatch, tmp_path):
    import lorakit.bases.load as load

    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    A, B = torch.eye(4)[2:3] * 6, torch.eye(4)[:, 2:3]  # ΔW = 6 in the third direction, where W is 2
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4, bias=False)})
    model["q_proj"].weight.data = W
    Adapter(LoraConfig(rank=1, targets=["q_proj"]), {"q_proj": Factors(A, B, 1.0)}).save(tmp_path / "a")
    monkeypatch.setattr(load, "load_model", lambda *args: model)
    (row,) = amplification.norms(str(tmp_path / "a"), 1)
    assert row["in_delta"] == pytest.approx(2)
    assert row["norm_delta"] == pytest.approx(6)
    assert row["factor"] == pytest.approx(3)
    assert row["in_w"] == pytest.approx(4)


def test_nist_prefers_informative_matches():
    pytest.importorskip("nltk")
    references = [["the Blue Spice is a pub in the city centre", "a pub in the city centre , the Blue Spice"]] * 2
    right, wrong = "the Blue Spice is a pub in the city centre", "a a a a a the the the in"
    assert nist([right, right], references) > 2 * nist([wrong, wrong], references)
    # five words, each once: log2(5 / 1) of information in each, and none in what must follow; no penalty for the length
    assert nist(["a b c d e"], [["a b c d e"]]) == pytest.approx(math.log2(5))
    assert nist(["a", "b"], references) is None  # shorter than the longest n-gram


def test_a_method_that_cannot_train_the_base_is_listed_with_its_reason():
    fit = e2e.fitting({"method": "no_such_method"})
    assert fit["rate"] is None
    assert "no_such_method" in fit["reason"]
    assert e2e.fitting({"method": "full"})["rate"] == pytest.approx(e2e.AUTO / 10)
    assert set(few_data.COMPARED) <= set(e2e.METHODS)


def test_budgets_name_what_a_table_does_not_take():
    with pytest.raises(ConfigError, match="--steps has no effect on gpt3"):
        suite.budgets(["gpt3"], {"steps": 3})
    both = suite.budgets(["gpt3", "ranks"], {"steps": 3, "seeds": None})
    assert both["ranks"].flags() == " --seeds 3 --steps 3 --rows 35"
    assert both["gpt3"].flags() == ""
    with pytest.raises(ConfigError, match="did you mean 'subspaces'"):
        suite.load("subspace")


@pytest.mark.parametrize("name", suite.NAMES)
def test_every_table_has_what_the_command_needs(name):
    table = suite.load(name)
    assert table.TITLE
    assert isinstance(table.BUDGET, suite.Budget)
    assert callable(table.run)
    assert callable(table.tables)
    assert callable(table.findings)
