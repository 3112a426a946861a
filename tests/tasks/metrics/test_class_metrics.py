"""Accuracy, macro F1 and Matthews correlation, counted by hand and against scikit-learn's definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lorakit.tasks.metrics.classes import accuracy, macro_f1, matthews

TRUTH, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 1]


def test_accuracy_is_the_share_of_right_predictions():
    assert accuracy(TRUTH, PREDICTED) == 3 / 6
    assert accuracy(["yes", "no"], ["yes", "yes"]) == 0.5


def test_macro_f1_is_the_mean_over_classes():
    """From the confusion matrix, by hand: F1 is 2·2/(3+2), 2·1/(2+3) and 0."""
    assert macro_f1(TRUTH, PREDICTED) == pytest.approx((4 / 5 + 2 / 5 + 0) / 3)
    assert macro_f1([1, 1], [1, 1]) == 1
    assert macro_f1([0, 1], [1, 0]) == 0


def test_matthews_of_two_classes_is_the_known_formula():
    """(TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) with 3, 2, 1, 2."""
    truth = [1] * 5 + [0] * 3
    predicted = [1, 1, 1, 0, 0, 0, 0, 1]
    assert matthews(truth, predicted) == pytest.approx((3 * 2 - 1 * 2) / (4 * 5 * 3 * 4) ** 0.5)
    assert matthews(truth, truth) == 1
    assert matthews([0, 1], [1, 0]) == -1


def test_matthews_of_several_classes_is_the_correlation_of_the_indicator_columns():
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=50)
    predicted = np.where(rng.random(50) < 0.6, truth, rng.integers(4, size=50))
    x, y = (np.eye(4)[each] - np.eye(4)[each].mean(0) for each in (truth, predicted))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(truth.tolist(), predicted.tolist()) == pytest.approx(expected, rel=1e-12)


def test_one_class_predicted_throughout_is_no_correlation():
    assert matthews([0, 1, 1], [1, 1, 1]) == 0
    assert matthews([1, 1, 1], [1, 1, 1]) == 0  # as scikit-learn


def test_rows_are_needed_and_as_many_of_both():
    with pytest.raises(ValueError, match="no rows"):
        accuracy([], [])
    with pytest.raises(ValueError, match="shorter"):
        macro_f1([0, 1], [0])
