"""Where the weights that an adapter names lie in a base's files.

transformers and diffusers folders     a tensor each, under the model's own name or one that begins otherwise
                                       (`names.py`)
single files of a diffusion model      the original code's names; one tensor may hold the rows of several modules
                                       (attn.qkv)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..errors import TargetError, did_you_mean, listing
from ..formats import names
from ..io.stream import Slot
from .base import Base
from .names import Renaming, find_renaming
from .single_file import Place, places
from .single_file import bias_place as bias_in_single_file
from .tied_weights import declared, find_ties


@dataclass(frozen=True)
class Places:
    """Where each of an adapter's modules has its weight, by its own name; and how the files call other parameters."""

    modules: Mapping[str, Place]
    rename: Renaming = field(default_factory=Renaming)
    ties: Mapping[str, str] = field(default_factory=dict)  # user -> holder, in the files' names


# Modules of a diffusers component have the names of its files, but for the level of CLIP's that only some versions of
# transformers write.
_LEVELS = (Renaming("", "text_model."), Renaming("text_model.", ""))


def find_places(base: Base, modules: Collection[str], saved: Collection[str] = ()) -> Places:
    """Of all these modules; TargetError where one is not there. `saved`: whole weights' names, which tell the renaming
    if nothing else does.
    """
    if base.single_file:
        return _in_single_file(base, modules)
    targets = [f"{module}.weight" for module in modules]
    wanted = targets or [n for n in saved if numbered(n)]
    # Only what lies outside the numbered layers can be tied; asking which are takes transformers.
    pairs = {} if all(map(numbered, (*targets, *saved))) else declared(base)
    held = [pairs.get(n, n) if n not in base.tensors else n for n in wanted]
    rename = find_renaming(held, base.tensors, base.folder, _LEVELS if base.component else None)
    ties = find_ties(base, pairs, rename)
    found = {}
    for module in modules:
        own = f"{module}.weight"
        at = next(n for n in (rename(own), own) if n in base.tensors or n in ties)
        slot = base.tensors.get(at) or base.tensors[ties[at]]
        found[module] = Place(at, 0, slot.shape[0] if slot.shape else 1)
    return Places(found, rename, ties)


def bias_place(base: Base, module: str, places: Places) -> Place:
    """Where a module's bias lies. TargetError if it has none."""
    here = places.modules[module]
    if base.single_file:
        found = bias_in_single_file(base.single_file, module, base.shapes)
        if found is not None:
            return found
    else:
        at = here.tensor.removesuffix("weight") + "bias"
        if at in base.tensors:
            return Place(at, 0, base.tensors[at].shape[0])
    raise TargetError(
        f"the adapter changes the bias of '{module}', which has none in {base.folder}\n"
        "  is it an adapter for another model?"
    )


def slot_at(base: Base, place: Place, ties: Mapping[str, str]) -> Slot:
    """The rows of a place, where the files hold them."""
    slot = base.tensors[place.tensor if place.tensor in base.tensors else ties[place.tensor]]
    return slot.part(place.start, place.stop) if slot.shape else slot


def numbered(name: str) -> bool:
    """Whether a weight is part of a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def _in_single_file(base: Base, modules: Collection[str]) -> Places:
    known = places(base.single_file, base.shapes)
    lost = [m for m in modules if m not in known]
    if lost:
        held = sorted({m.partition(".")[0] for m in known})
        strange = [m for m in lost if m not in names.shapes(base.single_file)]
        why = (
            f"{lost[0]!r} is no module of {base.single_file}{did_you_mean(lost[0], known)}"
            if strange
            else f"it holds {listing(held)} of {base.single_file}"
        )
        raise TargetError(
            f"{len(lost)} of the adapter's {len(modules)} weights are not in {base.folder}: {listing(lost, 3)}\n"
            f"  {why}\n"
            "  is it an adapter for another model?"
        )
    return Places({m: known[m] for m in modules})
