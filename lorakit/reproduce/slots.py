"""Slot errors: does a text say what its meaning representation says, and nothing else? For E2E NLG (Novikova et al. 2017).

    name[The Vaults], eatType[pub], priceRange[more than £30], area[riverside], near[Café Adriatic]

A slot is *missing* when no wording of its value is found in the text. An attribute is *wrong* when another of its values is stated
(whether the representation has the attribute or not), or when a known restaurant is named that the representation does not name.
A slot whose value was replaced by another is one error (wrong), not two.

    rate = 100 · (missing + wrong) / slots

This is a pattern matcher over word lists (`slot_words`), not an understanding of the text: it cannot see swapped roles ("A is near B"
for "B is near A"), sarcasm, or a paraphrase that nobody wrote down. Calibrated on the data's human references, which get

    development set   6.9 %   (1,654 missing, 267 wrong of 27,759 slots)
    test set          7.9 %   (2,232 missing, 328 wrong of 32,332 slots)

because the authors do leave out and contradict slots: of 100 flagged slots drawn at random and read, 87 were the author's own. So
about one percent is the matcher's noise, and a model that copies every slot scores below the humans.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import DataError
from .slot_words import FOR_FAMILIES, LEVEL_OF, LEVELS, NAMES, NOT_FOR_FAMILIES

_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")
_PLAIN = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‑": "-", "−": "-"})
_NAMED = ("name", "near")


@dataclass(frozen=True)
class Checked:
    """What one text gets wrong. `missing`: slot names. `wrong`: what was stated instead, as `slot: value`."""

    missing: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class SlotErrors:
    """Counts over all texts; `rate` in percent of the slots."""

    missing: int
    wrong: int
    slots: int
    rate: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def slot_error_rate(mrs: Sequence[str], texts: Sequence[str]) -> SlotErrors:
    """The errors of texts[i] against the meaning representation mrs[i]."""
    if len(mrs) != len(texts):
        raise DataError(f"{len(mrs)} meaning representations but {len(texts)} texts\n  expected one text for each")
    if not mrs:
        raise DataError("no rows to check\n  expected at least one meaning representation with its text")
    parsed = [parse_mr(mr) for mr in mrs]
    checked = [check_slots(slots, text) for slots, text in zip(parsed, texts)]
    missing, wrong, slots = sum(len(c.missing) for c in checked), sum(len(c.wrong) for c in checked), sum(map(len, parsed))
    return SlotErrors(missing, wrong, slots, 100 * (missing + wrong) / slots)


def parse_mr(mr: str) -> dict[str, str]:
    """`name[The Vaults], eatType[pub]` as a dict, in the order of the text."""
    slots: dict[str, str] = {}
    at = 0
    while at < len(mr.rstrip()):
        found = _SLOT.match(mr, at)
        if found is None:
            raise DataError(f"meaning representation {mr!r}: cannot read {mr[at:].strip()!r}\n  expected slot[value], slot[value], ...")
        slot, value = found[1], found[2].strip()
        if slot in slots:
            raise DataError(f"meaning representation {mr!r}: slot {slot!r} appears twice\n  expected each slot once")
        if not value:
            raise DataError(f"meaning representation {mr!r}: slot {slot!r} has no value\n  expected {slot}[value]")
        slots[slot] = value
        at = found.end()
    if not slots:
        raise DataError(f"meaning representation {mr!r} has no slots\n  expected slot[value], slot[value], ...")
    return slots


def check_slots(slots: Mapping[str, str], text: str) -> Checked:
    """Which of the slots the text lacks, and what it states that is not among them."""
    plain = normalise(text)
    missing, wrong = _check_names(slots, plain)
    rest = _KNOWN.sub("@", _mask([slots[slot] for slot in _NAMED if slot in slots], plain))
    for attribute in LEVELS:
        others = _other_levels(attribute, slots.get(attribute), rest)
        wrong += [f"{attribute}: {other}" for other in others[:1]]
        if attribute in slots and not others and not _realised(attribute, slots[attribute], rest):
            missing.append(attribute)
    stated = _family(rest)
    if stated is not None and stated != slots.get("familyFriendly"):
        wrong.append(f"familyFriendly: {stated}")
    elif stated is None and "familyFriendly" in slots:
        missing.append("familyFriendly")
    unknown = [slot for slot in slots if slot not in LEVELS and slot not in (*_NAMED, "familyFriendly")]
    missing += [slot for slot in unknown if not _says(slots[slot], plain)]
    return Checked(tuple(missing), tuple(wrong))


def normalise(text: str) -> str:
    """Lower case, no accents, plain quotes and hyphens, single spaces."""
    letters = unicodedata.normalize("NFKD", text.translate(_PLAIN).lower())
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())


def _check_names(slots: Mapping[str, str], plain: str) -> tuple[list[str], list[str]]:
    given = [slots[slot] for slot in _NAMED if slot in slots]
    strays = sorted({_SPELLING[name] for name in _KNOWN.findall(_mask(given, plain))})
    missing = [slot for slot in _NAMED if slot in slots and not _says(slots[slot], plain)]
    return missing[len(strays) :], [f"name: {name}" for name in strays]  # a stray name in place of a missing one is one error


def _other_levels(attribute: str, value: str | None, rest: str) -> list[str]:
    """The levels of the attribute, not that of `value`, that the text states."""
    own = None if value is None else _level_of(attribute, value)
    return [
        name
        for name, level in LEVELS[attribute].items()
        if name != own and level.states is not None and level.states.search(rest) is not None
    ]


def _realised(attribute: str, value: str, rest: str) -> bool:
    level = LEVELS[attribute].get(_level_of(attribute, value))
    return _says(value, rest) if level is None else level.accepts.search(rest) is not None


def _level_of(attribute: str, value: str) -> str:
    return LEVEL_OF.get(attribute, {}).get(value, value)


def _family(rest: str) -> str | None:
    """ "yes", "no" or None: what the text says about families. Refusals are cut out first, so "not family-friendly" is no "yes"."""
    without, refusals = NOT_FOR_FAMILIES.subn(" ", rest)
    if refusals:
        return "no"
    return "yes" if FOR_FAMILIES.search(without) else None


def _says(value: str, plain: str) -> bool:
    return _verbatim(value).search(plain) is not None


@functools.lru_cache(maxsize=1024)
def _verbatim(*values: str) -> re.Pattern[str]:
    """Any of the values as whole words, the longest first."""
    anyone = "|".join(re.escape(normalise(value)) for value in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{anyone})(?!\w)")


def _mask(names: Sequence[str], plain: str) -> str:
    """The text with names blanked, so that "Raja Indian Cuisine" says nothing about the food."""
    return _verbatim(*names).sub("@", plain) if names else plain


_KNOWN = _verbatim(*NAMES)
_SPELLING = {normalise(name): name for name in NAMES}
