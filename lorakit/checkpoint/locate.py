"""Find the weights that an adapter names in a base's files.

transformers and diffusers folders     a tensor each, under the model's own name or with another prefix (`renaming.py`)
single files of a diffusion model      the original code's names; one tensor may hold the rows of several modules
                                       (attn.qkv)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..adapter.update import Update
from ..errors import TargetError, did_you_mean, listing
from ..formats import names
from ..io.stream import Slot
from .base import Base
from .renaming import Renaming, find_renaming
from .single_file import WeightRows, bias_rows, module_rows
from .tied_weights import declared, find_ties


@dataclass(frozen=True)
class Locations:
    """The rows of each module's weight, by module name. `rename`: to the files' names, for other parameters."""

    modules: Mapping[str, WeightRows]
    rename: Renaming = field(default_factory=Renaming)
    ties: Mapping[str, str] = field(default_factory=dict)  # user -> holder, in the files' names


# A diffusers component's files have its module names, except for a level in CLIP that only some versions of
# transformers write.
_LEVELS = (Renaming("", "text_model."), Renaming("text_model.", ""))


_PACKED = ".in_proj_weight"  # of an nn.MultiheadAttention, which is a module without a `weight`


def _weight_name(module: str, update: Update | None, attentions: Collection[str]) -> str:
    """Return the name of a module's weight; with another prefix in the files, its last name tells an attention.

    `attentions`: the names of such weights in the files.
    """
    last = f".{module.rpartition('.')[2]}{_PACKED}"
    packed = f"{module}{_PACKED}" in attentions or any(name.endswith(last) for name in attentions)
    if packed:
        return f"{module}{_PACKED}"
    return f"{module}.weight" if update is None else update.weight_name(module)


def locate(base: Base, modules: Mapping[str, Update | None], saved: Collection[str] = ()) -> Locations:
    """Find all these modules. Raises TargetError if the base lacks one. `modules`: by name, with their updates, which
    know their weight's name (None: "weight"); `saved`: names of saved weights, used to find the renaming if there are
    no modules.
    """
    if base.single_file:
        return _in_single_file(base, modules)
    attentions = {name for name in base.tensors if name.endswith(_PACKED)}
    weights = {module: _weight_name(module, update, attentions) for module, update in modules.items()}
    targets = list(weights.values())
    lookups = targets or [n for n in saved if numbered(n)]
    # Only weights outside the numbered layers can be tied; transformers, a slow import, knows which are.
    pairs = {} if all(map(numbered, (*targets, *saved))) else declared(base)
    stored = [pairs.get(n, n) if n not in base.tensors else n for n in lookups]
    rename = find_renaming(stored, base.tensors, base.folder, _LEVELS if base.component else None)
    ties = find_ties(base, pairs, rename)
    found = {}
    for module, own in weights.items():
        at = next(n for n in (rename(own), own) if n in base.tensors or n in ties)
        slot = base.tensors.get(at) or base.tensors[ties[at]]
        found[module] = WeightRows(at, 0, slot.shape[0] if slot.shape else 1)
    return Locations(found, rename, ties)


def locate_bias(base: Base, module: str, locations: Locations) -> WeightRows:
    """Return the rows of a module's bias. Raises TargetError if it has none."""
    found = _bias(base, module, locations)
    if found is None:
        raise TargetError(
            f"the adapter changes the bias of '{module}', which has none in {base.folder}\n"
            "  is it an adapter for another model?"
        )
    return found


def has_bias(base: Base, module: str, locations: Locations) -> bool:
    """Whether a module has a bias."""
    return _bias(base, module, locations) is not None


def _bias(base: Base, module: str, locations: Locations) -> WeightRows | None:
    if base.single_file:
        return bias_rows(base.single_file, module, base.shapes)
    here = locations.modules[module]
    at = here.tensor.removesuffix("weight") + "bias"
    return WeightRows(at, 0, base.tensors[at].shape[0]) if at in base.tensors else None


def slot_at(base: Base, rows: WeightRows, ties: Mapping[str, str]) -> Slot:
    """Return these rows as a slot of the file that stores them, also for tied weights."""
    slot = base.tensors[rows.tensor if rows.tensor in base.tensors else ties[rows.tensor]]
    return slot.part(rows.start, rows.stop) if slot.shape else slot


def numbered(name: str) -> bool:
    """Whether a weight is part of a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def _in_single_file(base: Base, modules: Collection[str]) -> Locations:
    known = module_rows(base.single_file, base.shapes)
    missing = [m for m in modules if m not in known]
    if missing:
        components = sorted({m.partition(".")[0] for m in known})
        unknown = [m for m in missing if m not in names.shapes(base.single_file)]
        why = (
            f"{missing[0]!r} is not a module of {base.single_file}{did_you_mean(missing[0], known)}"
            if unknown
            else f"it holds {listing(components)} of {base.single_file}"
        )
        raise TargetError(
            f"{len(missing)} of the adapter's {len(modules)} weights are not in {base.folder}: {listing(missing, 3)}\n"
            f"  {why}\n"
            "  is it an adapter for another model?"
        )
    return Locations({m: known[m] for m in modules})
