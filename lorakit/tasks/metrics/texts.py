"""Score generated text against one or more references per row: BLEU, chrF, ROUGE and exact match, each 0 to 100.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are corpus scores, computed by sacrebleu with its default settings.
ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) are F1 scores of what prediction and reference have in common,

    P = common / |prediction|    R = common / |reference|    F1 = 2·P·R / (P + R)

words for ROUGE-1, pairs of adjacent words for ROUGE-2, the longest common subsequence of words for ROUGE-L. Words are
those of the `rouge_score` package: lower case, runs of a-z and 0-9, no stemming. Text in another script has no such
words and scores 0; use chrF or exact match there. ROUGE and exact match take the best reference of each row and average
over rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ConfigError, DataError

_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Scores:
    """Scores from 0 to 100, higher is better, over `rows` predictions."""

    bleu: float
    chrf: float
    rouge_1: float
    rouge_2: float
    rouge_l: float
    exact_match: float
    rows: int

    def to_dict(self) -> dict[str, float | int]:
        """Return plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Compared:
    """What exact match compares of two texts.

    pattern: a regular expression, such as r"####\\s*(.*)": its last match in the text, or that one's first group. None:
    the entire text. normalize: without regard to case and to how much whitespace there is.
    """

    pattern: re.Pattern[str] | None = None
    normalize: bool = False

    def of(self, text: str) -> str | None:
        """Return what is compared; None if the pattern is not in the text."""
        if self.pattern is not None:
            found = [*self.pattern.finditer(text)]
            if not found:
                return None
            text = found[-1].group(1 if self.pattern.groups else 0) or ""
        return " ".join(text.casefold().split()) if self.normalize else text.strip()


def compared(pattern: str | None, normalize: bool = False) -> Compared:
    """Return what to compare. Raises ConfigError if the pattern is no regular expression."""
    try:
        return Compared(None if pattern is None else re.compile(pattern), normalize)
    except re.error as error:
        raise ConfigError(f"'{pattern}' is not a regular expression: {error}") from None


def score(predictions: Sequence[str], references: Sequence[Sequence[str]], exact: Compared | None = None) -> Scores:
    """Score each prediction against its own references; their number may differ between rows.

    exact: what exact match compares; the entire texts by default. Raises DataError where a prediction has no
    references, they are not a list, or none has what is to be compared.
    """
    _check(predictions, references)
    bleu, chrf = _corpus(predictions, references)
    rows = list(zip(predictions, references))

    def mean(measure: Callable[[str, str], float]) -> float:
        return 100 * sum(max(measure(text, other) for other in others) for text, others in rows) / len(rows)

    return Scores(
        bleu=bleu,
        chrf=chrf,
        rouge_1=mean(lambda text, other: rouge_n(text, other, 1)),
        rouge_2=mean(lambda text, other: rouge_n(text, other, 2)),
        rouge_l=mean(rouge_l),
        exact_match=100 * exact_match(predictions, references, exact or Compared()),
        rows=len(rows),
    )


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], exact: Compared) -> float:
    """Return the share of predictions that equal one of their references, 0 to 1.

    A prediction without what is compared is wrong. Raises DataError where no reference of a row has it.
    """
    right = 0
    for index, (text, others) in enumerate(zip(predictions, references, strict=True)):
        expected = {exact.of(other) for other in others} - {None}
        if not expected:
            assert exact.pattern is not None
            raise DataError(
                f"references[{index}]: '{exact.pattern.pattern}' is in none of them, such as {others[0][-60:]!r}\n"
                "  expected a pattern that every correct answer has"
            )
        right += exact.of(text) in expected
    return right / len(predictions)


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """Return the F1 of the n-grams that two texts have in common, 0 to 1. An n-gram counts as often as in both."""
    predicted, expected = (_ngrams(_words(text), n) for text in (prediction, reference))
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0  # 2PR / (P + R), simplified


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n))))


def rouge_l(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F1 of two texts, 0 to 1."""
    predicted, expected = _words(prediction), _words(reference)
    common = lcs_length(predicted, expected)
    if common == 0:
        return 0.0
    return 2 * common / (len(predicted) + len(expected))  # 2PR / (P + R), simplified


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by dynamic programming with one row of the table."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _words(text: str) -> list[str]:
    return _NOT_A_WORD.sub(" ", text.lower()).split()


def _corpus(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    from sacrebleu.metrics import BLEU, CHRF

    # sacrebleu takes streams: the k-th reference of every row, None where a row has fewer
    most = max(map(len, references))
    streams: list[Any] = [[row[k] if k < len(row) else None for row in references] for k in range(most)]
    # force silences a warning about texts that look tokenized, nothing else
    return BLEU(force=True).corpus_score(predictions, streams).score, CHRF().corpus_score(predictions, streams).score


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions but {len(references)} rows of references\n"
            "  expected one list of references for each prediction"
        )
    if not predictions:
        raise DataError("no rows to score\n  expected at least one prediction with its references")
    for index, row in enumerate(references):
        if isinstance(row, str):
            raise DataError(f"references[{index}] is a single text\n  expected a list of texts, such as [{row[:40]!r}]")
        if not row:
            raise DataError(
                f"references[{index}] is empty\n  every row needs at least one reference; drop the row or give it one"
            )
