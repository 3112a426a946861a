"""What a request's `model` names: the base, an adapter, or a mix of adapters with weights.

    sql                  an adapter by its public name         sql:0.5            the same at half its scale
    qwen                 the base by one of its names          sql:0.7+chat:0.3   both at once
    qwen:sql             SGLang's form: base, then adapter

A name is made of ASCII letters, digits, "_", "-", "." and "/", so that none of these forms can be mistaken for a name,
and a name can stand in an HTTP header and in a metric's label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..errors import ConfigError, LorakitError, listing, nearest
from .errors import UnknownAdapter

Parts = tuple[tuple[str, float], ...]  # (an adapter's public name, its weight), ...; () is the base alone

MOST_CHARACTERS = 128  # of a name
MOST_PARTS = 8  # adapters in one mix
LARGEST_WEIGHT = 100.0
# Similar names are looked for on the event loop. Among 500 names that takes about 5 ms, among 10,000 about 100.
MOST_COMPARED = 500

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_WEIGHT = re.compile(r"[+-]?(\d{1,6}(\.\d{0,12})?|\.\d{1,12})")


def is_name(name: str) -> bool:
    """Whether an adapter may be called so."""
    return len(name) <= MOST_CHARACTERS and _NAME.fullmatch(name) is not None


def check_name(name: str, base_names: Collection[str]) -> None:
    """Raise ConfigError if an adapter cannot be called so, or the base is."""
    if name in base_names:
        raise ConfigError(f"'{name}' is the name of the base\n  give the adapter another one")
    if not is_name(name):
        raise ConfigError(
            f"{_shown(name)} cannot be an adapter's name; expected at most {MOST_CHARACTERS} of the characters A-Z a-z "
            "0-9 _ - . and /, with a letter, a digit or _ first and behind each /"
        )


def parse(model: str, known: Collection[str], base_names: Sequence[str]) -> Parts:
    """Return the adapters that a request's `model` names, with their weights as written.

    known: the adapters' public names. Raises UnknownAdapter for a name that is neither theirs nor the base's, and
    ConfigError for an invalid weight or mix.
    """
    if model in base_names:
        return ()
    if model in known:
        return ((model, 1.0),)
    for base in sorted(base_names, key=len, reverse=True):
        if model.startswith(f"{base}:") and len(model) > len(base) + 1:
            rest = model[len(base) + 1 :]
            first = rest.split("+")[0]
            if first not in known and _WEIGHT.fullmatch(first):
                raise _weighted_base(model)
            return _mix(model, rest, known, base_names)
    return _mix(model, model, known, base_names)


def scaled(parts: Parts, scale: float | None) -> Parts:
    """Multiply all weights by a request's scale. Raises ConfigError for an invalid scale, or one for the base."""
    if scale is None:
        return parts
    if not parts:
        raise ConfigError("lorakit.scale was given with the base, which has no adapter to scale\n  leave it out")
    if not math.isfinite(scale) or abs(scale) > LARGEST_WEIGHT:
        raise ConfigError(f"lorakit.scale is {scale}; expected a number from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}")
    products = tuple((name, weight * scale) for name, weight in parts)
    for name, product in products:
        if abs(product) > LARGEST_WEIGHT:
            raise ConfigError(
                f"lorakit.scale: with it, '{name}' has the weight {product:g}; expected a number from "
                f"{-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            )
    return products


def unknown(name: str, known: Iterable[str], base_names: Sequence[str]) -> UnknownAdapter:
    """Return the error for a name that nothing has, with the nearest of the public names."""
    names = [*base_names, *known]
    if len(names) > MOST_COMPARED:
        names = [one for one in names if one[:1].lower() == name[:1].lower()][:MOST_COMPARED]
    similar = nearest(name[:MOST_CHARACTERS], names)
    hint = f"; did you mean '{similar}'?" if similar else ""
    return UnknownAdapter(f"there is no model {_shown(name)}{hint}\n  GET /v1/models lists those that there are")


def name_keys(error: LorakitError, public: Mapping[str, str]) -> None:
    """Write public names for keys in an error of the engine, which knows no others. public: key to name."""
    text = str(error)
    for key, name in public.items():
        text = text.replace(key, name)
    if text != str(error):
        error.args = (text,)


def _mix(model: str, text: str, known: Collection[str], base_names: Sequence[str]) -> Parts:
    if "+" not in text and ":" not in text:
        if text in known:
            return ((text, 1.0),)
        raise unknown(text, known, base_names)
    parts = text.split("+")
    if len(parts) > MOST_PARTS:
        raise ConfigError(f"model: a mix of {len(parts)} adapters; expected at most {MOST_PARTS}")
    found: dict[str, float] = {}
    for part in parts:
        name, colon, weight = part.partition(":")
        if not name and text.strip("+:"):
            raise ConfigError(f"model: {_shown(model)} is a mix with a name left out\n  expected such as a:0.7+b:0.3")
        if name in base_names and name not in known:
            raise _weighted_base(model)
        if name not in known:
            raise unknown(name if len(parts) > 1 else text, known, base_names)
        if name in found:
            raise ConfigError(f"model: '{name}' is twice in the mix {_shown(model)}\n  expected each adapter once")
        found[name] = _weight(weight, name) if colon else 1.0
    return tuple(found.items())


def _weighted_base(model: str) -> ConfigError:
    return ConfigError(
        f"model: {_shown(model)} gives the base a weight or a place in a mix, which only adapters have\n"
        "  leave it out: the base is always there"
    )


def _weight(text: str, name: str) -> float:
    value = float(text) if _WEIGHT.fullmatch(text) else math.nan
    if not abs(value) <= LARGEST_WEIGHT:
        raise ConfigError(
            f"model: the weight of '{name}' is {_shown(text)}; expected a number from {-LARGEST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}, such as {name}:0.7"
        )
    return value


def _shown(text: str) -> str:
    """Return what a client wrote, for an error: quoted, on one line, and not longer than a name can be."""
    shown = repr(text[:MOST_CHARACTERS])
    return f"{shown[:-1]}...{shown[-1]}" if len(text) > MOST_CHARACTERS else shown


def skipped(paths: Sequence[str]) -> str:
    """Say which paths below a root cannot be names."""
    return (
        f"{len(paths)} adapters are not served, as their paths cannot be their names: {listing(map(ascii, paths), 3)}\n"
        "  rename them: letters, digits, _ - . only, and not as the base"
    )
