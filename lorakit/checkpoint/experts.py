"""Updates of experts under the names of a checkpoint's tensors.

transformers 5 stacks the experts of a layer into one parameter when it loads a model, and takes them apart again when
it saves one. Most files have a matrix for each expert:

    <experts>.gate_up_proj [E, 2·i, h]    <experts>.3.w1.weight, .3.w3.weight  or  .3.gate_proj.weight, .3.up_proj.weight
    <experts>.up_proj      [E, i, h]      <experts>.3.up_proj.weight
    <experts>.down_proj    [E, h, i]      <experts>.3.w2.weight                or  .3.down_proj.weight

where <experts> may be in a block of another name (Mixtral's block_sparse_moe is mlp in the model). Others have the
stacked parameter (gpt-oss), possibly with its matrices transposed. The names that fit the files decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..adapter.experts import ExpertFactors
from ..adapter.update import Update
from ..errors import TargetError
from .base import Base
from .renaming import find_renaming

_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "mixer")
_PROJECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),  # the halves of its outputs
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}


def as_stored(base: Base, updates: Mapping[str, Update]) -> dict[str, dict[str, Update]]:
    """Return each module's update as updates of the files' tensors: module -> name without ".weight" -> update.

    An update that is no stack of experts, or whose stack the files hold as such, stays as it is.
    """
    stored: dict[str, dict[str, Update]] = {}
    for module, update in updates.items():
        if not isinstance(update, ExpertFactors) or _is_in(base, [module]):
            stored[module] = {module: _laid_out(base, module, update) if isinstance(update, ExpertFactors) else update}
            continue
        names = next((names for names in _names(module) if _is_in(base, (f"{n}.weight" for n in names(0)))), None)
        if names is None:
            stored[module] = {module: update}  # which is then said to be missing
            continue
        own: dict[str, Update] = {}
        for e in range(update.experts):
            factors = replace(update.of_expert(e), transposed=False)
            parts = names(e)
            for name, B in zip(parts, factors.B.chunk(len(parts)), strict=True):
                own[name] = replace(factors, B=B)
        stored[module] = own
    return stored


class _Names:
    """The files' names of an expert's matrices: called with its number."""

    def __init__(self, holder: str, projections: tuple[str, ...]):
        self.holder, self.projections = holder, projections

    def __call__(self, expert: int) -> list[str]:
        return [f"{self.holder}.{expert}.{projection}" for projection in self.projections]


def _names(module: str) -> Iterator[_Names]:
    """Yield the ways in which files may name the experts of this parameter."""
    holder, _, parameter = module.rpartition(".")
    front, _, last = holder.rpartition(".")
    outer, _, block = front.rpartition(".")
    holders = [holder]
    if block in _BLOCKS:
        holders += [".".join(filter(None, (outer, other, last))) for other in _BLOCKS if other != block]
    for each in holders:
        for projections in _PROJECTIONS.get(parameter, ()):
            yield _Names(each, projections)


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
    others = [f"{holder}.{other}" for other in _PROJECTIONS if other != parameter]
    for other in (name for name in others if _is_in(base, [name])):
        shape = base.tensors[find_renaming([other], base.tensors, base.folder)(other)].shape
        if len(shape) == 3 and shape[1] != shape[2]:
            return replace(update, transposed=shape[2] > shape[1])  # [E, h, 2·i], of which h = i
    return update
