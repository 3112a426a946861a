"""Factors of experts as a value: arithmetic, resizing, editing, comparing, each expert by itself."""

from __future__ import annotations

import pytest
import torch
from made_experts import adapted

import lorakit as lk
from lorakit.adapter.algebra.product import norm, separate
from lorakit.adapter.algebra.resize import resize
from lorakit.adapter.algebra.spectrum import spectrum
from lorakit.adapter.experts import ExpertFactors
from lorakit.analysis.compare import compare
from lorakit.analysis.inspect import describe_adapter
from lorakit.errors import AdapterError

DOWN = "model.layers.0.mlp.experts.down_proj"


def adapter(architecture: str = "mixtral", rank: int = 3, seed: int = 1, **settings) -> lk.Adapter:
    from made_experts import moe, randomise

    model = lk.attach(moe(architecture), lk.LoraConfig(rank=rank, alpha=6.0, targets=["experts", "q_proj"], **settings))
    return lk.capture(randomise(model, seed=seed))


def exact(update: ExpertFactors) -> torch.Tensor:
    """ΔW in float64, by the equation."""
    full = update.scale * update.B.double() @ update.A.double()
    return full.mT if update.transposed else full


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_sums_and_multiples_are_those_of_delta(architecture):
    a, b = adapter(architecture), adapter(architecture, rank=2, seed=7)
    total = 0.7 * a - 2.0 * b
    for name, update in total.updates.items():
        expected = 0.7 * a.updates[name].delta().double() - 2.0 * b.updates[name].delta().double()
        torch.testing.assert_close(update.delta().double(), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(total.updates[DOWN], ExpertFactors)
    assert total.updates[DOWN].rank == 5
    assert total.updates[DOWN].transposed is (architecture == "gpt_oss")


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"keep": 0.9}, {"error": 0.3}, {"keep": 0.9, "overall": True}], ids=str
)
def test_resized_each_expert_is_truncated_to_its_first_singular_values(options):
    before = adapter(rank=4)
    found = resize(before, **options)
    after = found.adapter
    assert {r.module for r in found.modules} == set(before.updates)
    reports = {r.module: r for r in found.modules}
    old, new = exact(before.updates[DOWN]), exact(after.updates[DOWN])
    assert reports[DOWN].error == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-5)
    assert reports[DOWN].after == after.updates[DOWN].rank <= 4
    if "rank" in options:
        S = torch.linalg.svdvals(old)
        best = S[:, 2:].square().sum().sqrt() / old.norm()
        assert reports[DOWN].error == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune", "svd"])
def test_other_methods_work_expert_by_expert(method):
    a, b = adapter(), adapter(seed=7)
    density = {} if method == "svd" else {"density": 0.5}
    both = lk.combine([a, b], method=method, **density)
    found = both.updates[DOWN]
    assert isinstance(found, ExpertFactors)
    assert found.rank == 3
    parts = [
        lk.combine(
            [lk.Adapter(each.config, {f"{DOWN}.2": each.updates[DOWN].of_expert(2)}) for each in (a, b)],
            method=method,
            force=True,
            **density,
        )
    ]
    torch.testing.assert_close(found.of_expert(2).delta(), parts[0].updates[f"{DOWN}.2"].delta(), atol=1e-4, rtol=1e-3)


def test_stacks_of_other_sizes_are_not_added():
    a = adapter()
    b = lk.Adapter(a.config, {DOWN: a.updates[DOWN].map(lambda _, t: t[:3])})
    with pytest.raises(AdapterError, match=r"stack of other sizes.*'?3"):
        lk.combine([lk.Adapter(a.config, {DOWN: a.updates[DOWN]}), b], force=True)
    linear = lk.Adapter(a.config, {DOWN: a.updates[DOWN].of_expert(0)})
    with pytest.raises(AdapterError, match="stack of other sizes"):
        lk.combine([lk.Adapter(a.config, {DOWN: a.updates[DOWN]}), linear], force=True)


def test_they_are_pruned_selected_renamed_and_cast_by_name():
    a = adapter()
    assert {n.rpartition(".")[2] for n in a.prune(["gate_up_proj"]).updates} == {"down_proj", "q_proj"}
    assert all("experts" in n for n in a.select(r".*experts.*").updates)
    renamed = a.rename({"model": "language_model.model"})
    assert f"language_model.{DOWN}" in renamed.updates
    assert a.to(torch.bfloat16).updates[DOWN].A.dtype == torch.bfloat16


def test_norms_and_spectra_are_those_of_all_experts():
    update = adapter().updates[DOWN]
    full = exact(update)
    assert norm(update) == pytest.approx(float(full.norm()), rel=1e-5)
    found = spectrum(update)
    S = torch.linalg.svdvals(full).flatten().sort(descending=True).values
    torch.testing.assert_close(found.S[: 3 * 4], S[: 3 * 4], rtol=1e-4, atol=1e-6)
    assert found.rank == 3 * 4
    assert found.sizes == update.sizes[::-1]
    assert len(separate({DOWN: update})) == 4


def test_inspect_and_compare_show_them(capsys):
    a, b = adapter(), adapter(seed=7)
    facts = describe_adapter(a, "-")
    down = next(m for m in facts.modules if m.name == DOWN)
    assert (down.kind, down.rank, down.norm) == ("experts", 3, pytest.approx(norm(a.updates[DOWN]), rel=1e-5))
    facts.show()
    assert "down_proj" in capsys.readouterr().out
    found = compare(a, b)
    pairs = {pair.name: pair for pair in found.pairs}
    x, y = exact(a.updates[DOWN])[2], exact(b.updates[DOWN])[2]
    assert pairs[f"{DOWN}.2"].cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-5)
    assert compare(a, a).cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("A", "B", "said"),
    [
        ((4, 3, 8), (4, 8, 2), r"A \[4, 3, 8\] and B \[4, 8, 2\]; expected \[experts, r, in\] and \[experts, out, r\]"),
        ((4, 3, 8), (5, 8, 3), r"expected \[experts, r, in\]"),
        ((3, 8), (8, 3), r"expected at least three axes"),
    ],
    ids=str,
)
def test_malformed_factors_are_refused_with_their_module(A, B, said):
    update = ExpertFactors(torch.ones(A), torch.ones(B), 1.0)
    with pytest.raises(AdapterError, match=rf"(?s)'the\.experts'.*{said}"):
        update.check("the.experts")


def test_a_summary_names_their_sizes():
    assert "4 experts (down_proj, gate_up_proj)" in lk.summary(adapted("mixtral")).experts
