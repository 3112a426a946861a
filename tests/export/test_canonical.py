"""The canonical form: the same ΔW, one rank, scale 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError
from lorakit.export.canonical import canonical, is_canonical


def factors(rank: int, alpha: float, rslora: bool = False, dtype: torch.dtype = torch.float64) -> lk.Factors:
    made = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype) for shape in ((rank, 6), (5, rank)))
    return lk.Factors(A, B, alpha, rslora=rslora)


def adapter(**modules: lk.Factors) -> lk.Adapter:
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=4, targets=sorted(modules)), modules)


MIXED = {"a": factors(2, 4), "b": factors(3, 1.5), "c": factors(4, 8, rslora=True)}


def test_every_module_keeps_its_update_at_one_rank_and_scale_one():
    before = adapter(**MIXED)
    after = canonical(before)
    assert is_canonical(after)
    assert not is_canonical(before)
    for module, f in before.factors.items():
        now = after.factors[module]
        assert (now.rank, now.alpha, now.scale, now.rslora) == (4, 4.0, 1.0, False)
        torch.testing.assert_close(now.delta(), f.delta(), rtol=1e-12, atol=1e-12)
    assert (after.config.rank, after.config.alpha, after.config.rank_pattern, after.config.rslora) == (4, 4, {}, False)


def test_a_canonical_adapter_does_not_change():
    before = canonical(adapter(**MIXED))
    after = canonical(before)
    assert all(
        torch.equal(after.factors[m].B, f.B) and torch.equal(after.factors[m].A, f.A) for m, f in before.factors.items()
    )


def test_a_larger_rank_is_zero_padded_and_a_smaller_one_refused():
    after = canonical(adapter(**MIXED), 8)
    assert {f.rank for f in after.factors.values()} == {8}
    torch.testing.assert_close(after.factors["b"].delta(), MIXED["b"].delta(), rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match="rank 4, more than 3"):
        canonical(adapter(**MIXED), 3)


def test_convolutions_and_embeddings_are_zero_padded():
    conv = lk.Factors(torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), 6.0, "conv")
    embedding = lk.Factors(torch.randn(3, 7), torch.randn(5, 3), 1.0, "embedding")
    after = canonical(adapter(c=conv, e=embedding))
    assert after.factors["c"].A.shape == (3, 3, 3, 3)
    for module, f in (("c", conv), ("e", embedding)):
        torch.testing.assert_close(after.factors[module].delta(), f.delta(), rtol=1e-5, atol=1e-5)


def test_a_packed_projection_becomes_a_plain_update():
    from lorakit.ops.packed import expand_packed

    f = lk.Factors(
        torch.randn(4, 6), expand_packed(torch.randn(2, 3, 2), (True, False, True)), 4.0, parts=(True, False, True)
    )
    after = canonical(adapter(a=f)).factors["a"]
    assert after.parts is None
    torch.testing.assert_close(after.delta(), f.delta())


@pytest.mark.parametrize(
    "broken, said",
    [
        (replace(adapter(**MIXED), updates={**MIXED, "d": Dense(torch.ones(2, 2))}), "not low-rank factors"),
        (adapter(a=Dora(factors(2, 4), torch.ones(5, 1, dtype=torch.float64))), "DoRA"),
    ],
)
def test_updates_without_a_canonical_form_are_refused(broken, said):
    with pytest.raises(AdapterError, match=said):
        canonical(broken)
