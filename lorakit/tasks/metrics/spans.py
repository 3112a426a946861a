"""Measures of spans: entities in BIO tags, and answers cut out of a text.

Entities are counted as the CoNLL-2003 script `conlleval` (Tjong Kim Sang and De Meulder 2003) and seqeval's default
mode count them: an entity is right if its type, its first and its last word are. In tags that break the scheme, an I-
that follows nothing of its type begins an entity.

Answers are compared as SQuAD's evaluation script does (Rajpurkar et al. 2016): in lower case, without punctuation and
the articles a, an, the, with single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_HEADS = frozenset("BIOESLU")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Entity:
    """`first`, `last`: indices of its words."""

    kind: str
    first: int
    last: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence's tags: "B-PER", "I-PER", "O". A tag without B- or I- counts as I-.

    Also of IOB1, where B- is only used to part two entities of a kind, and of the ends E-, L- and S-, U- of BIOES and
    BILOU, which close an entity.
    """
    found: list[Entity] = []
    open_kind, first = "", 0
    closed = True
    for place, tag in enumerate([*tags, "O"]):
        head, dash, kind = tag.partition("-")
        if not dash:
            head, kind = (tag, "") if tag in _HEADS else ("I", tag)
        begins = head in ("B", "S", "U") or (head != "O" and (closed or kind != open_kind))
        if not closed and (begins or head == "O"):
            found.append(Entity(open_kind, first, place - 1))
            closed = True
        if begins:
            open_kind, first, closed = kind, place, False
        if head in ("E", "L", "S", "U") and not closed:
            found.append(Entity(open_kind, first, place))
            closed = True
    return found


def entity_scores(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 over the entities of all sentences (micro average); 0 where there is none."""
    right = true = guessed = 0
    for own, theirs in zip(truth, predicted, strict=True):
        if len(own) != len(theirs):
            raise ValueError(f"a sentence has {len(own)} tags and {len(theirs)} predicted ones; expected as many")
        expected, found = set(entities(own)), set(entities(theirs))
        right, true, guessed = right + len(expected & found), true + len(expected), guessed + len(found)
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (true + guessed) if true + guessed else 0.0,
    }


def normalized(answer: str) -> str:
    """Return an answer in lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals one of the answers, normalized, else 0. No answers: the empty text is right."""
    return float(normalized(predicted) in {normalized(answer) for answer in answers or [""]})


def answer_f1(predicted: str, answers: Sequence[str]) -> float:
    """Return the best F1, 0 to 1, of the prediction's words against those of each answer, normalized.

    No answers: 1 for the empty text, else 0 (SQuAD 2.0).
    """
    return max(_word_f1(normalized(predicted).split(), normalized(answer).split()) for answer in answers or [""])


def _word_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))
