"""Another rank: optimal (Eckart and Young) against the full SVD in float64, and the reported error is the true one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_adapters import adapter, deltas, exact, factors, numbers, packed

import lorakit as lk
from lorakit.adapter.algebra.resize import resize
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError, ConfigError


def one(update, **config) -> lk.Adapter:
    return lk.Adapter(lk.LoraConfig(rank=4, targets=["m"], **config), {"m": update})


def as_matrix(update, W):
    across = isinstance(update, lk.Factors) and (update.transposed or update.kind == "embedding")
    return (W.T if across else W).flatten(1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_module_is_the_nearest_of_its_rank(rank):
    value = adapter(others=True, rslora=True)
    done = resize(value, rank)
    assert {u.variant for u in done.adapter.updates.values()} == {"lora"}
    assert {f.rank for f in done.adapter.factors.values()} == {min(rank, 2), rank}  # the packed one has 2
    before, after = deltas(value), deltas(done.adapter)
    for report in done.modules:
        update, W, W2 = value.updates[report.module], before[report.module], after[report.module]
        assert W2.shape == W.shape
        if report.module == "layers.0.qkv":
            best = sum(float(torch.linalg.svdvals(rows)[rank:].square().sum()) for rows in (W[:4], W[8:])) ** 0.5
        else:
            best = float(torch.linalg.svdvals(as_matrix(update, W))[rank:].square().sum()) ** 0.5
        error = float((W - W2).norm())
        assert error == pytest.approx(best, rel=1e-5, abs=1e-5 * float(W.norm()))
        assert report.error == pytest.approx(error / float(W.norm()), rel=1e-4, abs=1e-6)
        assert report.norm == pytest.approx(float(W.norm()), rel=1e-5)
    total = sum(float((before[m] - after[m]).square().sum()) for m in before) / sum(
        float(W.square().sum()) for W in before.values()
    )
    assert done.error == pytest.approx(total**0.5, rel=1e-5)
    assert done.energy == pytest.approx(1 - total, rel=1e-5)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99, 1.0])
def test_as_small_as_the_energy_allows_and_no_smaller(keep):
    value = adapter(others=True)
    done = resize(value, keep=keep)
    for report in done.modules:
        assert report.energy >= keep - 1e-6
        if report.after > 1 and report.module != "layers.0.qkv":
            W = as_matrix(value.updates[report.module], exact(value.updates[report.module]))
            S = torch.linalg.svdvals(W).square()
            assert float(S[: report.after - 1].sum() / S.sum()) < keep + 1e-6


def test_a_largest_error_is_kept_to():
    done = resize(adapter(), error=0.3)
    assert 0.05 < max(m.error for m in done.modules) <= 0.3
    assert [f.rank for f in resize(adapter(), error=0.3).adapter.factors.values()] == [
        f.rank for f in resize(adapter(), keep=0.91).adapter.factors.values()
    ]


def test_one_threshold_for_all_modules_spends_the_ranks_where_the_change_is():
    strong = replace(factors(rank=4), alpha=60.0)
    value = lk.Adapter(lk.LoraConfig(rank=4, targets=["q"]), {"strong.q": strong, "weak.q": factors(rank=4, seed=1)})
    done = resize(value, keep=0.9, overall=True)
    assert done.energy >= 0.9
    strong_rank, weak_rank = (done.adapter.factors[m].rank for m in ("strong.q", "weak.q"))
    assert strong_rank > weak_rank == 1
    each = resize(value, keep=0.9)
    assert sum(m.after for m in done.modules) < sum(m.after for m in each.modules)


def test_overall_holds_for_other_kinds_too():
    assert resize(adapter(others=True), keep=0.95, overall=True).energy >= 0.95 - 1e-6


def test_a_module_already_that_small_is_the_same_object():
    value = adapter(rank=4)
    done = resize(value, 100)
    assert all(done.adapter.factors[m] is f for m, f in value.factors.items())
    assert done.error == 0
    assert done.adapter.config.rank == 4


def test_what_a_resized_module_is_does_not_change():
    value = adapter()
    small = value.resize(2)
    for m, f in small.factors.items():
        was = value.factors[m]
        assert (f.kind, f.transposed, f.parts, f.groups) == (was.kind, was.transposed, was.parts, was.groups)
        assert f.scale == pytest.approx(was.scale)
        assert small.config.rank_of(m) == f.rank
        assert small.config.alpha_of(m) == pytest.approx(f.alpha)
    assert small.rank == 2


def test_the_precision_stays_and_the_error_includes_its_rounding():
    value = one(factors(dtype=torch.bfloat16))
    done = resize(value, 3)
    assert done.adapter.factors["m"].A.dtype == torch.bfloat16
    W = exact(value.factors["m"])
    true = float((W - exact(done.adapter.factors["m"])).norm() / W.norm())
    best = float(torch.linalg.svdvals(W)[3:].norm() / W.norm())
    assert done.modules[0].error == pytest.approx(true, rel=1e-5)
    assert true > best


def test_a_zero_update_stays_zero():
    done = resize(one(lk.Factors(numbers(4, 15), torch.zeros(12, 4), 6.0)), keep=0.9)
    assert done.adapter.factors["m"].rank == 1
    assert not done.adapter.factors["m"].delta().any()
    assert done.error == 0


def test_a_resized_adapter_survives_pefts_folder(tmp_path):
    small = adapter(others=True, rslora=True).resize(2)
    plain = replace(small, updates={m: f for m, f in small.factors.items() if not f.transposed})
    back = lk.Adapter.load(plain.save(tmp_path / "small"))
    for m, W in deltas(plain).items():
        torch.testing.assert_close(exact(back.factors[m]), W)


def test_rslora_stays_where_all_modules_have_it():
    value = one(factors(rslora=True), rslora=True)
    small = value.resize(2)
    assert small.factors["m"].rslora
    assert small.config.rslora
    assert small.factors["m"].scale == pytest.approx(value.factors["m"].scale)


def test_a_grouped_convolution_stays_grouped():
    f = lk.Factors(numbers(4, 3, 3, 3), numbers(16, 4, 1, 1), 4.0, "conv", groups=2)
    small = one(f).resize(2).factors["m"]
    assert small.groups == 2
    assert small.A.shape == (2, 3, 3, 3)


def test_a_change_of_a_norm_or_a_bias_alone_stays_as_it_is():
    value = lk.Adapter(lk.LoraConfig(), {"q": factors(), "norm": Dense(numbers(9)), "head": Dense(None, numbers(5))})
    small = value.resize(1)
    assert small.updates["norm"] is value.updates["norm"]
    assert {m for m, u in small.updates.items() if u.variant == "dense"} == {"norm", "head"}


def test_a_bias_beside_a_matrix_is_not_dropped_in_silence():
    value = one(Dense(numbers(11, 9), numbers(11)))
    with pytest.raises(AdapterError, match="'m' changes its bias too"):
        resize(value, 3)
    assert resize(value, 3, drop_bias=True).adapter.factors["m"].rank == 3


def test_a_dora_and_a_grouped_conv_of_pefts_are_refused_by_name():
    with pytest.raises(AdapterError, match="'m' is a DoRA"):
        resize(one(Dora(factors(), torch.ones(12, 1))), 2)
    with pytest.raises(AdapterError, match="'m' is a grouped convolution"):
        resize(one(lk.Factors(numbers(4, 6, 3, 3), numbers(16, 2, 1, 1), 4.0, "conv", groups=2)), 2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "needs a rank"),
        ({"rank": 0}, "at least 1"),
        ({"keep": 1.5}, "at most 1"),
        ({"error": 0}, "more than 0"),
        ({"keep": 0.9, "error": 0.1}, "twice"),
        ({"rank": 3, "overall": True}, "overall needs keep"),
    ],
)
def test_what_makes_no_sense_is_said(options, said):
    with pytest.raises(ConfigError, match=said):
        resize(adapter(), **options)


def test_packed_parts_share_the_larger_rank():
    f = packed(rank=3)
    B = f.B.clone()
    B[:4, 1:3] *= 1e-3  # the first part needs one singular value, the last all three
    done = resize(one(replace(f, B=B)), keep=0.999)
    assert done.adapter.factors["m"].parts == f.parts
    assert 1 <= done.adapter.factors["m"].rank <= 3
    assert done.energy >= 0.999 - 1e-9
    assert math.isclose(done.adapter.factors["m"].scale, f.scale)


def test_overall_takes_no_more_than_it_must_of_whole_updates_too():
    """Slow and fast spectra side by side: the slow one's values are needed further than its own share of the energy
    goes.
    """

    def whole(values):
        U, V = (torch.linalg.qr(numbers(220, len(values), seed=seed))[0] for seed in (1, 2))
        return Dense(U * values @ V.T)

    slow, fast = torch.full((120,), 10.0), torch.logspace(0, -3, 60)
    value = lk.Adapter(lk.LoraConfig(targets=["q"]), {"l.0.q": whole(slow), "l.1.q": whole(fast)})
    done = resize(value, keep=0.9995, overall=True)
    values = torch.cat([slow, fast]).square().double().sort(descending=True).values
    least = int((values.cumsum(0) < 0.9995 * values.sum()).sum()) + 1
    assert done.energy >= 0.9995 - 1e-6
    assert sum(m.after for m in done.modules) <= least + 1  # each module keeps a rank of 1 at least
