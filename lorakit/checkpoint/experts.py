"""Updates of experts under the names of a checkpoint's tensors.

transformers 5 stacks the experts of a layer into one parameter when it loads a model, and takes them apart again when
it saves one. Most files have a matrix for each expert (`adapter.expert_names`), others the stacked parameter (gpt-oss),
possibly with its matrices transposed. The names that fit the files decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..adapter.expert_names import PROJECTIONS, ways
from ..adapter.experts import ExpertFactors
from ..adapter.update import Update
from ..errors import TargetError
from .base import Base
from .renaming import find_renaming


def as_stored(base: Base, updates: Mapping[str, Update]) -> dict[str, dict[str, Update]]:
    """Return each module's update as updates of the files' tensors: module -> name without ".weight" -> update.

    An update that is no stack of experts, or whose stack the files hold as such, stays as it is.
    """
    stored: dict[str, dict[str, Update]] = {}
    for module, update in updates.items():
        if not isinstance(update, ExpertFactors) or _is_in(base, [module]):
            stored[module] = {module: _laid_out(base, module, update) if isinstance(update, ExpertFactors) else update}
            continue
        way = next((way for way in ways(module) if _is_in(base, (f"{n}.weight" for n in way.of(0)))), None)
        if way is None:
            stored[module] = {module: update}  # which is then said to be missing
            continue
        own: dict[str, Update] = {}
        for e in range(update.experts):
            factors = replace(update.of_expert(e), transposed=False)
            parts = way.of(e)
            for name, B in zip(parts, factors.B.chunk(len(parts)), strict=True):
                own[name] = replace(factors, B=B)
        stored[module] = own
    return stored


def _is_in(base: Base, names: Iterable[str]) -> bool:
    """Whether the files have all these tensors, perhaps with another beginning of their names."""
    try:
        find_renaming(list(names), base.tensors, base.folder)
    except TargetError:
        return False
    return True


def _laid_out(base: Base, module: str, update: ExpertFactors) -> ExpertFactors:
    """Return the update of square matrices with the layout of the other parameter of its experts, since their own shape
    does not show it.
    """
    out, inner = update.sizes
    if out != inner:
        return update
    holder, _, parameter = module.rpartition(".")
    others = [f"{holder}.{other}" for other in PROJECTIONS if other != parameter]
    for other in (name for name in others if _is_in(base, [name])):
        shape = base.tensors[find_renaming([other], base.tensors, base.folder)(other)].shape
        if len(shape) == 3 and shape[1] != shape[2]:
            return replace(update, transposed=shape[2] > shape[1])  # [E, h, 2·i], of which h = i
    return update
