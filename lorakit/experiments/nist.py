"""NIST, as nltk computes it: n-gram matches weighted by their information, so that rare n-grams count more.

Doddington 2002, up to 5-grams, on sacrebleu's 13a tokens (those of mteval), case kept. nltk is not among lorakit's
dependencies: without it there is no score. METEOR and CIDEr are not computed: nltk's METEOR needs WordNet, which it
downloads, and none of the installed libraries has CIDEr.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 5


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Return the corpus score; None if nltk is not installed or no text is long enough to have a score."""
    try:
        from nltk.translate.nist_score import corpus_nist
    except ImportError:
        return None
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    words = [split(text).split() for text in texts]
    try:
        return float(corpus_nist([[split(other).split() for other in row] for row in references], words, LONGEST))
    except ZeroDivisionError:  # all texts have fewer words than the longest n-gram
        return None
