"""Count slot errors: does a text state its meaning representation, and nothing else? For E2E NLG (Novikova 2017).

    name[The Vaults], eatType[pub], priceRange[more than £30], area[riverside], near[Café Adriatic]

A slot is *missing* if no wording of its value is found in the text. An attribute is *wrong* if another of its values is
stated (whether or not the representation has the attribute), or if a known restaurant is named that the representation
does not name. A slot whose value is replaced by another is one error (wrong), not two.

    rate = 100 · (missing + wrong) / slots

This is a pattern matcher over word lists (`slot_words`): it misses swapped roles ("A is near B" for "B is near A"),
sarcasm, and paraphrases that are not in the lists. Calibrated on the data's human references, which score

    development set   6.9 %   (1,654 missing, 267 wrong of 27,759 slots)
    test set          7.9 %   (2,232 missing, 328 wrong of 32,332 slots)

because the authors do omit and contradict slots: of 100 flagged slots drawn at random and read, 87 were the author's
error. So about one percentage point is the matcher's noise, and a model that copies every slot scores below the humans.
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
    """The errors of one text. `missing`: slot names. `wrong`: what is stated instead, as `slot: value`."""

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
    """Count the errors of each texts[i] against its meaning representation mrs[i]. Raises DataError."""
    if len(mrs) != len(texts):
        raise DataError(f"{len(mrs)} meaning representations but {len(texts)} texts\n  expected one text for each")
    if not mrs:
        raise DataError("no rows to check\n  expected at least one meaning representation with its text")
    parsed = [parse_mr(mr) for mr in mrs]
    checked = [check_slots(slots, text) for slots, text in zip(parsed, texts)]
    missing, wrong, slots = (
        sum(len(c.missing) for c in checked),
        sum(len(c.wrong) for c in checked),
        sum(map(len, parsed)),
    )
    return SlotErrors(missing, wrong, slots, 100 * (missing + wrong) / slots)


def parse_mr(mr: str) -> dict[str, str]:
    """Parse `name[The Vaults], eatType[pub]` into an ordered dict. Raises DataError."""
    slots: dict[str, str] = {}
    at = 0
    while at < len(mr.rstrip()):
        match = _SLOT.match(mr, at)
        if match is None:
            raise DataError(
                f"meaning representation {mr!r}: cannot read {mr[at:].strip()!r}\n"
                "  expected slot[value], slot[value], ..."
            )
        slot, value = match[1], match[2].strip()
        if slot in slots:
            raise DataError(f"meaning representation {mr!r}: slot {slot!r} appears twice\n  expected each slot once")
        if not value:
            raise DataError(f"meaning representation {mr!r}: slot {slot!r} has no value\n  expected {slot}[value]")
        slots[slot] = value
        at = match.end()
    if not slots:
        raise DataError(f"meaning representation {mr!r} has no slots\n  expected slot[value], slot[value], ...")
    return slots


def check_slots(slots: Mapping[str, str], text: str) -> Checked:
    """Find the slots that a text does not state, and the values it states that are not in `slots`."""
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
    """Normalise to lower case, no accents, plain quotes and hyphens, single spaces."""
    letters = unicodedata.normalize("NFKD", text.translate(_PLAIN).lower())
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())


def _check_names(slots: Mapping[str, str], plain: str) -> tuple[list[str], list[str]]:
    given = [slots[slot] for slot in _NAMED if slot in slots]
    strays = sorted({_SPELLING[name] for name in _KNOWN.findall(_mask(given, plain))})
    missing = [slot for slot in _NAMED if slot in slots and not _says(slots[slot], plain)]
    # a stray name in place of a missing one is one error
    return missing[len(strays) :], [f"name: {name}" for name in strays]


def _other_levels(attribute: str, value: str | None, rest: str) -> list[str]:
    """Return the attribute's levels that the text states, other than that of `value`."""
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
    """Return "yes", "no" or None. Refusals are removed first, so that "not family-friendly" does not match "yes"."""
    without, refusals = NOT_FOR_FAMILIES.subn(" ", rest)
    if refusals:
        return "no"
    return "yes" if FOR_FAMILIES.search(without) else None


def _says(value: str, plain: str) -> bool:
    return _verbatim(value).search(plain) is not None


@functools.lru_cache(maxsize=1024)
def _verbatim(*values: str) -> re.Pattern[str]:
    """Match any of the values as full words, longest first."""
    any_value = "|".join(re.escape(normalise(value)) for value in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{any_value})(?!\w)")


def _mask(names: Sequence[str], plain: str) -> str:
    """Blank out names, so that "Raja Indian Cuisine" does not state a food."""
    return _verbatim(*names).sub("@", plain) if names else plain


_KNOWN = _verbatim(*NAMES)
_SPELLING = {normalise(name): name for name in NAMES}
