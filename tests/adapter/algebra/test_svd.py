"""Singular values without the matrix, and of a matrix without all of them: against LAPACK's full SVD in float64."""

from __future__ import annotations

import pytest
import torch
from made_adapters import exact, factors, hadamard, kronecker, numbers, packed

from lorakit.adapter.algebra.svd import distance, full_svd, matrix_svd, needed, product_svd, random_svd
from lorakit.adapter.dense import Dense
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr


@pytest.mark.parametrize("m, r, n", [(40, 5, 30), (6, 9, 30), (40, 9, 7), (3, 1, 1)])
def test_the_svd_of_a_product_is_that_of_the_matrix(m, r, n):
    B, A = numbers(m, r), numbers(r, n)
    found, full = product_svd(B, A), torch.linalg.svdvals(B.double() @ A.double())
    torch.testing.assert_close(found.S, full[: len(found.S)], rtol=1e-12, atol=1e-12 * float(full[0]))
    torch.testing.assert_close(found.U * found.S @ found.Vt, B.double() @ A.double(), rtol=1e-11, atol=1e-11)
    assert found.total == pytest.approx(float(full.square().sum()))


def spectra():
    """A full-rank noise floor under a strong part, a slow decay, and plain noise."""
    low = numbers(400, 12) @ numbers(12, 300)
    U, V = (torch.linalg.qr(numbers(n, 300))[0] for n in (400, 300))
    slow = U * (1 / torch.arange(1, 301).sqrt()) @ V.T
    return {"low rank and noise": low + 0.3 * numbers(400, 300), "slow decay": slow, "noise": numbers(400, 300)}


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("kind", list(spectra()))
def test_a_random_svd_is_within_a_thousandth_of_the_best_error(kind, rank):
    W = spectra()[kind].double()
    found, best = random_svd(W, rank), torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
    error = distance(W, *found.halves()) ** 0.5
    assert best <= error * (1 + 1e-12)
    assert error <= 1.002 * best


def test_a_random_svd_of_a_low_rank_matrix_is_exact():
    W = numbers(500, 6).double() @ numbers(6, 420).double()
    found = random_svd(W, 6)
    assert distance(W, *found.halves()) ** 0.5 < 1e-12 * float(W.norm())
    assert random_svd(W, 40).rank == 6


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999, 1.0])
def test_as_many_singular_values_as_hold_the_energy_and_not_one_more(keep):
    W = numbers(300, 250).double() * torch.linspace(1, 0.01, 250) ** 3
    energy = torch.linalg.svdvals(W).square().cumsum(0) / W.square().sum()
    found = matrix_svd(W, keep=keep)
    assert abs(len(found.S) - (int((energy < keep - 1e-12).sum()) + 1)) <= (1 if keep < 1 else 250)
    assert distance(W, *found.halves()) <= (1 - keep + 1e-9) * float(W.square().sum())


def test_needed_never_gives_none_and_never_too_few():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [needed(S, 14.0, k) for k in (0.1, 9 / 14, 0.65, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert needed(S, 15.0, 0.99) == 4  # a part of the matrix is not here: all there is, then
    assert needed(torch.zeros(3), 0.0, 0.9) == 1


def tucker():
    return Loha(
        numbers(2, 20),
        numbers(2, 18),
        numbers(2, 20, seed=1),
        numbers(2, 18, seed=1),
        1.0,
        numbers(2, 2, 3, 3),
        numbers(2, 2, 3, 3, seed=1),
    )


KINDS = {
    "linear": factors(),
    "conv": factors("conv"),
    "embedding": factors("embedding"),
    "transposed": factors(transposed=True),
    "rslora": factors(rslora=True),
    "LoHa": hadamard(),
    "LoHa, Tucker": tucker(),
    "LoKr": kronecker(),
    "LoHa of a high rank": Loha(numbers(20, 5), numbers(5, 18), numbers(20, 5, seed=1), numbers(5, 18, seed=1), 1.0),
    "LoKr, conv, Tucker": Lokr(
        2.0, w1a=numbers(4, 2), w1b=numbers(2, 3), w2a=numbers(2, 5), w2b=numbers(2, 6), t2=numbers(2, 2, 3, 3)
    ),
    "LoKr, conv": Lokr(2.0, w1=numbers(4, 3), w2=numbers(5, 6, 3, 3)),
    "whole": Dense(numbers(11, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_update_of_any_kind_has_the_singular_values_of_its_matrix(kind):
    update = KINDS[kind]
    (found,) = update.singular_values()
    W = exact(update)
    shapes = update.factor_shapes("m")
    matrix = (W.T if shapes.weight_transposed else W).flatten(1)
    torch.testing.assert_close(update.matrix().double(), matrix, rtol=1e-5, atol=1e-5)
    full = torch.linalg.svdvals(matrix)
    count = min(len(full), len(found.S))
    torch.testing.assert_close(found.S[:count].double(), full[:count], rtol=1e-5, atol=1e-5 * float(full[0]))
    torch.testing.assert_close((found.U * found.S @ found.Vt).double(), matrix, rtol=1e-5, atol=1e-5 * float(full[0]))


def test_the_parts_of_a_packed_projection_have_singular_values_of_their_own():
    f = packed()
    first, last = f.singular_values()
    W = exact(f)
    for found, rows in ((first, W[:4]), (last, W[8:])):
        torch.testing.assert_close(found.U * found.S @ found.Vt, rows, rtol=1e-6, atol=1e-6)


def test_small_matrices_take_the_full_svd():
    W = numbers(30, 20)
    assert torch.equal(matrix_svd(W, 5).S, full_svd(W).S[:5])
