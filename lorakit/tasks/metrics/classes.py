"""Measures of predicted classes: accuracy, macro F1, Matthews correlation. As scikit-learn computes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def accuracy(truth: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Return the share of predictions that are right. Raises ValueError without any."""
    pairs = _pairs(truth, predicted)
    return sum(t == p for t, p in pairs) / len(pairs)


def macro_f1(truth: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Average the classes' F1 = 2·TP / (2·TP + FP + FN), over all classes in `truth` or `predicted`."""
    pairs = _pairs(truth, predicted)
    right = Counter(t for t, p in pairs if t == p)
    true, guessed = Counter(truth), Counter(predicted)
    classes = true.keys() | guessed.keys()
    return sum(2 * right[name] / (true[name] + guessed[name]) for name in classes) / len(classes)


def matthews(truth: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Return the Matthews correlation, -1 to 1, of two or more classes (Gorodkin 2004, R_K).

        (c·n − Σₖ tₖ pₖ) / √((n² − Σₖ pₖ²) (n² − Σₖ tₖ²))

    n: rows; c: right predictions; tₖ, pₖ: how often class k is true, and is predicted. 0 where one class is all that is
    true or all that is predicted.
    """
    pairs = _pairs(truth, predicted)
    n, c = len(pairs), sum(t == p for t, p in pairs)
    true, guessed = Counter(truth), Counter(predicted)
    within = (n * n - sum(k * k for k in guessed.values())) * (n * n - sum(k * k for k in true.values()))
    return (c * n - sum(true[name] * guessed[name] for name in true)) / math.sqrt(within) if within else 0.0


def _pairs(truth: Sequence[Hashable], predicted: Sequence[Hashable]) -> list[tuple[Hashable, Hashable]]:
    if not truth:
        raise ValueError("no rows to measure; expected one at least")
    return list(zip(truth, predicted, strict=True))
