"""Word error rate of transcripts: how many words must be changed, added or left out.

    WER = Σ (substitutions + insertions + deletions) / Σ words of the references

Words are what stands between spaces; case and punctuation count. The least number of changes is the edit distance
(Levenshtein 1966) of the words. It is 0 where all is right, and above 1 where more is written than was said.
"""

from __future__ import annotations

from collections.abc import Sequence


def word_error_rate(references: Sequence[str], transcripts: Sequence[str]) -> float:
    """Return the word error rate over all rows. Raises ValueError if the references have no word."""
    pairs = [(r.split(), t.split()) for r, t in zip(references, transcripts, strict=True)]
    words = sum(len(reference) for reference, _ in pairs)
    if not words:
        raise ValueError("the references have no words; expected one at least")
    return sum(edit_distance(reference, transcript) for reference, transcript in pairs) / words


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the least number of words to substitute, insert or delete that makes one sequence of the other."""
    row = list(range(len(second) + 1))  # distances of the first's words so far to each start of the second
    for number, word in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for at, other in enumerate(second, start=1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (word != other))
    return row[-1]
