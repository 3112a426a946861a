"""Score generated text against one or more references per row: BLEU, chrF, ROUGE-L and exact match, each 0 to 100.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are corpus scores, computed by sacrebleu with its default settings.
ROUGE-L (Lin 2004) is the F1 of the longest common subsequence of words,

    P = |LCS| / |prediction|    R = |LCS| / |reference|    F1 = 2·P·R / (P + R)

with words as in the `rouge_score` package: lower case, runs of a-z and 0-9, no stemming. Text in another script has no
such words and scores 0; use chrF or exact match there. ROUGE-L and exact match take the best reference of each row and
average over rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import DataError

_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Scores:
    """Scores from 0 to 100, higher is better, over `rows` predictions."""

    bleu: float
    chrf: float
    rouge_l: float
    exact_match: float
    rows: int

    def to_dict(self) -> dict[str, float | int]:
        """Return plain data, for JSON."""
        return asdict(self)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score each prediction against its own references; their number may differ between rows.

    Raises DataError where a prediction has no references, or they are not a list.
    """
    _check(predictions, references)
    bleu, chrf = _corpus(predictions, references)
    rows = list(zip(predictions, references))
    return Scores(
        bleu=bleu,
        chrf=chrf,
        rouge_l=100 * sum(max(rouge_l(text, other) for other in others) for text, others in rows) / len(rows),
        exact_match=100 * sum(text.strip() in {other.strip() for other in others} for text, others in rows) / len(rows),
        rows=len(rows),
    )


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
