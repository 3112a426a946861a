"""Which diffusion model a file's keys are for: by their names and by their weights' widths.

Families share names. Flux and Flux.2 both have `double_blocks.0.img_mlp.0`, of 4 widths to 1 and of 6 to 1: proportions
hold at any width, so a model of another size, or a tiny one, is still recognised. Of several models that fit, the one
whose published sizes agree most often, then the one that the file's metadata names, then the first all of whose
blocks the file has.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from . import names

Size = tuple[int, int]  # (out, in) of a weight, a kernel left out
# Modules whose size varies within one model, by block or release: modulations of SD3 have 6 widths, 9 in SD3.5 medium's
# first blocks, which have a second attention, and 2 for the text in the last block.
_VARYING = {"sd3": re.compile(r"transformer_blocks\.\d+\.norm1(_context)?\.linear$")}
NARROWEST = 8  # narrower weights than this, of both sides, are no transformer's: their proportions say nothing


class Told(NamedTuple):
    """`model`: the one it is, or None. `nearest`: the one that knows most of the keys; `unknown`: those that it lacks.
    `contradiction`: where the names fit models of other widths, the first such key and what was expected.
    """

    model: str | None
    nearest: str
    unknown: list[str]
    contradiction: str = ""


def size_of(parts: Mapping[str, Tensor]) -> Size | None:
    """A weight's size as the tensors of its update tell it, by LyCORIS' suffixes; None if they do not."""

    def pair(up: str, down: str, turned: bool = False) -> Size | None:
        a, b = parts.get(up), parts.get(down)
        if a is None or b is None or a.dim() < 2 or b.dim() < 2:
            return None
        return a.shape[1 if turned else 0], b.shape[1]

    found = pair("lora_up.weight", "lora_down.weight") or pair("hada_w1_a", "hada_w1_b", "hada_t1" in parts)
    if found is not None:
        return found
    whole = parts.get("diff")
    if whole is not None and whole.dim() > 1:
        return whole.shape[0], whole.shape[1]
    first = pair("lokr_w1", "lokr_w1") or pair("lokr_w1_a", "lokr_w1_b")
    second = pair("lokr_w2", "lokr_w2") or pair("lokr_w2_a", "lokr_w2_b", "lokr_t2" in parts)
    return (first[0] * second[0], first[1] * second[1]) if first and second else None


def tell(sizes: Mapping[str, Size | None], said: str | None = None) -> Told:
    """The model of kohya's keys, with the size of each weight where it is known. `said`: by the file's metadata."""
    unknown = {model: [key for key in sizes if key not in names.modules_of(model)] for model in names.KNOWN}
    fitting = [model for model in names.KNOWN if not unknown[model]]
    nearest = min(names.KNOWN, key=lambda model: len(unknown[model]))
    if not fitting:
        return Told(None, nearest, unknown[nearest])
    contradictions = {model: _contradiction(model, sizes) for model in fitting}
    agreeing = [model for model in fitting if not contradictions[model]]
    if not agreeing:
        return Told(None, fitting[0], [], "; ".join(filter(None, contradictions.values())))
    return Told(_best(agreeing, sizes, said), agreeing[0], [])


def misspelt(key: str, model: str) -> str | None:
    """The model's key from which this one differs in a single letter, if there is one."""
    close = difflib.get_close_matches(key, names.modules_of(model), n=3, cutoff=0.9)
    return next((known for known in close if _one_letter_off(key, known)), None)


def _one_letter_off(one: str, other: str) -> bool:
    start = _common(one, other)
    end = _common(one[start:][::-1], other[start:][::-1])
    a, b = one[start : len(one) - end], other[start : len(other) - end]
    return max(len(a), len(b)) == 1 and not any(map(str.isdigit, a + b))


def _common(one: str, other: str) -> int:
    """How many letters they begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def disagreement(model: str, sizes: Mapping[str, Size | None]) -> str:
    """Where the widths of these modules (named as diffusers does) are not in a model's proportions, or ""."""
    return _contradiction(model, sizes, {module: (module,) for module in sizes if module in names.shapes(model)})


def _contradiction(
    model: str, sizes: Mapping[str, Size | None], modules_of: Mapping[str, tuple[str, ...]] | None = None
) -> str:
    known = names.modules_of(model) if modules_of is None else modules_of
    for key, size in sizes.items():
        if size is None or key not in known or min(size) < NARROWEST:
            continue
        listed = _listed(model, known[key])
        if listed is not None and _scales(model, known[key], listed) and size[0] * listed[1] != size[1] * listed[0]:
            return f"'{key}' has {size[0]} outputs and {size[1]} inputs, in {model} it has {listed[0]} and {listed[1]}"
    return ""


def _listed(model: str, modules: Iterable[str]) -> Size | None:
    """The listed size of a fused weight of these modules; None of a norm's."""
    shapes = [names.shapes(model)[module] for module in modules]
    return None if any(len(shape) < 2 for shape in shapes) else (sum(shape[0] for shape in shapes), shapes[0][1])


def _scales(model: str, modules: tuple[str, ...], listed: Size) -> bool:
    """Whether both sides grow with the model's width: of a block, and multiples of the width."""
    if model in _VARYING and _VARYING[model].search(modules[0]):
        return False
    in_block = re.search(r"\.\d+\.", modules[0]) is not None
    return in_block and any(listed[0] % width == 0 and listed[1] % width == 0 for width in names.widths(model))


def _best(models: list[str], sizes: Mapping[str, Size | None], said: str | None) -> str:
    if len(models) == 1:
        return models[0]
    votes = Counter({model: sum(_is_published(model, key, size) for key, size in sizes.items()) for model in models})
    best = [model for model in models if votes[model] == max(votes.values())]
    if said in best:
        return str(said)
    if len(best) == 1 or not names.widths(best[0]):
        return best[0]
    patterns = {_pattern(key) for key in sizes}
    covers = {m: len(sizes) / sum(_pattern(k) in patterns for k in names.modules_of(m)) for m in best}
    return next((model for model in best if covers[model] >= 1), best[0])


def _is_published(model: str, key: str, size: Size | None) -> bool:
    """Whether a weight has this size in one of the model's published sizes."""
    modules = names.modules_of(model)[key]
    listed = _listed(model, modules)
    if size is None or listed is None:
        return False
    if size == listed:
        return True
    all_widths = names.widths(model)
    return _scales(model, modules, listed) and any(
        size == (listed[0] * width // all_widths[0], listed[1] * width // all_widths[0]) for width in all_widths
    )


def _pattern(key: str) -> str:
    return re.sub(r"(?<=_)\d+(?=_)", "#", key, count=1)
