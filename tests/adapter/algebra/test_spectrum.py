"""Spectra from factors against the SVD of ΔW itself in float64, for every kind of update."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.adapter.algebra import spectrum as sp
from lorakit.adapter.algebra.product import inner, matrix, norm
from lorakit.adapter.algebra.spectrum import decompose, spectrum
from lorakit.adapter.algebra.svd import random_svd
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.adapter.update import LowRank


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=torch.float64)


KINDS = {
    "linear": Factors(random(3, 17), random(15, 3), alpha=6.0),
    "rslora": Factors(random(4, 17), random(15, 4), alpha=6.0, rslora=True),
    "transposed": Factors(random(3, 17), random(15, 3), alpha=6.0, transposed=True),
    "rank beyond the width": Factors(random(9, 5), random(4, 9), alpha=6.0),
    "embedding": Factors(random(3, 20), random(6, 3), alpha=1.0, kind="embedding"),
    "conv": Factors(random(3, 4, 3, 2), random(5, 3, 1, 1), alpha=2.0, kind="conv"),
    "grouped conv": Factors(random(4, 2, 3), random(6, 4, 1), alpha=2.0, kind="conv", groups=2),
    "loha": Loha(random(30, 2), random(2, 20), random(30, 3), random(3, 20), alpha=1.0),
    "loha of full rank": Loha(random(9, 4), random(4, 8), random(9, 4), random(4, 8), alpha=1.0),
    "loha tucker": Loha(
        random(2, 30),
        random(2, 6),
        random(2, 30),
        random(2, 6),
        alpha=3.0,
        t1=random(2, 2, 3, 3),
        t2=random(2, 2, 3, 3),
    ),
    "lokr": Lokr(alpha=2.0, w1=random(4, 2), w2a=random(9, 2), w2b=random(2, 12)),
    "lokr of two products": Lokr(alpha=2.0, w1a=random(5, 2), w1b=random(2, 5), w2a=random(6, 2), w2b=random(2, 7)),
    "lokr of two matrices": Lokr(alpha=2.0, w1=random(4, 3), w2=random(5, 6)),
    "lokr tall": Lokr(alpha=2.0, w1=random(12, 2), w2=random(10, 2)),
    "lokr tucker": Lokr(alpha=2.0, w1=random(2, 3), w2a=random(2, 12), w2b=random(2, 7), t2=random(2, 2, 3, 3)),
    "lokr conv": Lokr(alpha=2.0, w1=random(2, 3), w2=random(4, 5, 3, 3)),
    "whole": Dense(random(12, 9)),
    "whole conv": Dense(random(6, 3, 3, 3)),
    "norm": Dense(random(7)),
}


def full(update) -> torch.Tensor:
    """ΔW in float64 as [out, in]."""
    if isinstance(update, Factors):
        return update.scale * (update.B.flatten(1) @ update.A.flatten(1))
    delta = update.delta()
    return delta.flatten(1) if delta.dim() > 1 else delta[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_is_that_of_the_update_itself(kind):
    update, M = KINDS[kind], full(KINDS[kind])
    found = spectrum(update)
    expected = torch.linalg.svdvals(M)
    n = min(expected.numel(), found.S.numel())
    torch.testing.assert_close(found.S[:n], expected[:n], rtol=1e-10, atol=1e-10)
    assert expected[n:].norm() < 1e-10
    assert found.norm == pytest.approx(float(M.norm()), rel=1e-12)
    assert norm(update) == pytest.approx(float(M.norm()), rel=1e-12)
    torch.testing.assert_close(found.U * found.S @ found.V.T, M, rtol=1e-10, atol=1e-10)
    own = found.strongest()
    for basis in (own.U, own.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(own.rank, dtype=torch.float64), rtol=0, atol=1e-10)


def test_updates_of_low_rank_stay_products_and_only_those_of_full_rank_are_built():
    built = {kind for kind, update in KINDS.items() if not isinstance(matrix(update), LowRank)}
    assert built == {"loha of full rank", "lokr tall", "lokr conv", "whole", "whole conv", "norm"}


@pytest.mark.parametrize("a", ["linear", "transposed", "loose"])
@pytest.mark.parametrize("b", ["linear", "loose"])
def test_inner_products_agree_with_those_of_the_matrices(a, b):
    made = {"linear": KINDS["linear"], "transposed": KINDS["transposed"], "loose": Dense(random(15, 17))}
    expected = float((full(made[a]) * full(made[b])).sum())
    assert inner(matrix(made[a]), matrix(made[b])) == pytest.approx(expected, rel=1e-10)


def singular(*values: float) -> sp.Spectrum:
    U, V = (torch.linalg.qr(random(side, len(values)))[0] for side in (12, 9))
    return decompose(LowRank(U * torch.tensor(values, dtype=torch.float64), V.T))


def test_effective_rank_counts_the_directions_that_share_the_energy():
    assert singular(2, 2, 2).effective_rank == pytest.approx(3)
    assert singular(5, 0, 0).effective_rank == pytest.approx(1)
    p, q = 9 / 10, 1 / 10  # σ 3 and 1
    assert singular(3, 1).effective_rank == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))


def test_stable_rank_is_energy_over_that_of_the_strongest_direction():
    assert singular(2, 2, 2).stable_rank == pytest.approx(3)
    assert singular(3, 1).stable_rank == pytest.approx(10 / 9)


def test_an_update_of_zero_has_rank_zero_and_no_direction():
    found = spectrum(Factors(random(3, 7), torch.zeros(5, 3), alpha=1.0))
    assert (found.norm, found.rank, found.effective_rank, found.stable_rank) == (0, 0, 0, 0)
    assert found.strongest().U.shape == (5, 0)


def test_directions_of_rounding_are_not_counted():
    A, B = random(4, 30).float(), random(20, 4).float()
    assert spectrum(Factors(A, B, alpha=1.0)).rank == 4
    A[3] = A[0] * 0.3  # which float32 rounds
    found = spectrum(Factors(A, B, alpha=1.0))
    assert found.S[3] > 0
    assert found.rank == 3


def test_the_spectrum_of_a_dora_is_that_of_its_low_rank_part():
    f = KINDS["linear"]
    dora = Dora(f, torch.ones(15, 1))
    torch.testing.assert_close(spectrum(dora).S, spectrum(f).S)


def test_of_a_large_whole_update_the_strongest_directions_are_found(monkeypatch):
    monkeypatch.setattr(sp, "FULL_SVD_MAX_SIZE", 50)
    monkeypatch.setattr(sp, "LARGEST_VALUES", 6)
    U, V = (torch.linalg.qr(random(side, 70))[0] for side in (90, 80))
    S = torch.tensor([0.9**i for i in range(70)], dtype=torch.float64)
    found = spectrum(Dense(U * S @ V.T))
    assert not found.complete
    assert found.effective_rank is None
    assert found.norm == pytest.approx(float(S.norm()), rel=1e-10)
    torch.testing.assert_close(found.S, S[:6], rtol=1e-3, atol=0)
    assert found.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-3)


def test_the_strongest_directions_of_noise_hold_nearly_all_that_the_best_ones_do():
    """Noise is the hardest case: no gap between its singular values."""
    M = random(200, 160)
    best = torch.linalg.svdvals(M)[:8].norm()
    assert float(random_svd(M, 8).S.norm()) == pytest.approx(float(best), rel=0.01)
