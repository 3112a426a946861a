"""Mean squared error and the two correlations, by hand and against SciPy or numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorakit.tasks.metrics.values import mean_squared_error, pearson, ranks, spearman


def test_mean_squared_error():
    assert mean_squared_error([1.0, 2.0, 5.0], [1.5, 2.0, 3.0]) == pytest.approx((0.25 + 0 + 4) / 3)
    with pytest.raises(ValueError, match="no rows"):
        mean_squared_error([], [])


def test_pearson_is_numpys_correlation_also_far_from_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(40)
    y = x + rng.standard_normal(40)
    for shift in (0.0, 1e6):
        expected = np.corrcoef(x + shift, y)[0, 1]
        assert pearson((x + shift).tolist(), y.tolist()) == pytest.approx(expected, rel=1e-9)


def test_ranks_of_equal_values_are_their_mean():
    assert ranks([3.0, 1.0, 3.0, 2.0, 3.0]) == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_spearman_with_ties_by_hand():
    """Ranks 1.5, 1.5, 3, 4 and 2, 1, 3, 4: deviations −1, −1, .5, 1.5 and −.5, −1.5, .5, 1.5."""
    expected = (0.5 + 1.5 + 0.25 + 2.25) / math.sqrt(4.5 * 5)
    assert spearman([1.0, 1.0, 2.0, 9.0], [0.2, 0.1, 0.3, 0.4]) == pytest.approx(expected)


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x, y = rng.integers(6, size=60).tolist(), rng.integers(6, size=60).tolist()
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [1.0]), ([2.0, 2.0], [1.0, 3.0])])
def test_a_correlation_that_is_not_defined_is_not_a_number(x, y):
    assert math.isnan(pearson(x, y))
    assert math.isnan(spearman(x, y))
