"""The changes that several adapters make to a base's tensors: updates add up, saved weights replace, and never both.

W' = W + Σ wᵢ ΔWᵢ        each ΔWᵢ is that of the base alone, also where it depends on W (DoRA)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..adapter.update import Update
from ..errors import AdapterError, TargetError, listing
from .base import Base
from .change import Change, bias_for, update_for
from .locate import Locations, WeightRows, has_bias, locate_bias, slot_at
from .renaming import Renaming
from .vocabulary import check_heads, grown


@dataclass
class Changes:
    """Under the files' names. `updates`: tensor -> (start, stop) rows -> updates of these rows. `values`: tensor -> the
    saved weight that replaces it. `added`: those of `values` that the files do not have.
    """

    base: Base
    updates: dict[str, dict[tuple[int, int], list[Change]]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    @property
    def touched(self) -> list[str]:
        """All changed tensors."""
        return [*self.updates, *(n for n in self.values if n not in self.updates)]

    def add(self, weight: float, adapter: Adapter, locations: Locations) -> None:
        """Add one adapter's changes. Raises TargetError or AdapterError for a module or value that does not fit."""
        seen: set[tuple[str, int]] = set()  # rows that this adapter changes

        def only_once(rows: WeightRows, own: str) -> None:
            if (rows.tensor, rows.start) in seen:
                raise AdapterError(
                    f"the adapter changes the base's '{rows.tensor}' twice, the second time as '{own}'\n"
                    "  expected one change for each weight"
                )
            seen.add((rows.tensor, rows.start))

        for module, update in adapter.updates.items():
            rows = locations.modules[module]
            if update.changes_weight:
                only_once(rows, f"{module}.weight")
                slot = slot_at(self.base, rows, locations.ties)
                weight_grown = grown(update, slot)
                for at in _tied(update, rows, adapter, locations):
                    if weight_grown is not None:
                        self._replace(at.tensor, f"{module}.weight", weight_grown)
                    else:
                        self._put(at, update_for(module, update, slot, self.base.model_type, weight, rows))
            if update.bias_update() is not None and (update.needs_bias or has_bias(self.base, module, locations)):
                at = locate_bias(self.base, module, locations)
                only_once(at, f"{module}.bias")
                self._put(at, bias_for(module, update, slot_at(self.base, at, locations.ties), weight, at.swapped))
        for own, value in adapter.saved.items():
            name = self._tensor_of(own, value, locations)
            only_once(WeightRows(name, 0, 0), own)
            self._replace(name, own, value)

    def check(self) -> None:
        """Raise AdapterError for changes that cannot be combined."""
        check_heads(self.base, self.values)
        for name in self.values:
            if name in self.updates:
                raise AdapterError(
                    f"the adapters change '{name}' twice: one replaces it, another one adds to it\n  merge one of them"
                )

    def _put(self, rows: WeightRows, update: Change) -> None:
        self.updates.setdefault(rows.tensor, {}).setdefault((rows.start, rows.stop), []).append(update)

    def _replace(self, at: str, own: str, value: Tensor) -> None:
        if at in self.values and not (self.values[at].shape == value.shape and self.values[at].equal(value)):
            raise AdapterError(
                f"the adapters hold different values of the saved weight '{own}', and two values have no sum\n"
                "  lorakit combine --saved mean takes their mean; merge its result"
            )
        self.values[at] = value

    def _tensor_of(self, own: str, value: Tensor, locations: Locations) -> str:
        base, rename, ties = self.base, locations.rename, locations.ties
        at = next((n for n in (rename(own), own) if n in base.tensors or n in ties), None)
        if at is None:
            at = rename(own) if rename.old else own
            if at not in self.added:
                _check_new(own, base, rename)
                self.added.append(at)
            return at
        expected = base.tensors[at if at in base.tensors else ties[at]].shape
        if value.shape != expected:
            raise AdapterError(
                f"saved weight '{own}' has shape {list(value.shape)}; the base's has {list(expected)}\n"
                "  was its vocabulary resized? resize the base in the same way (model.resize_token_embeddings), and "
                "save it first"
            )
        return at


def _tied(update: Update, rows: WeightRows, adapter: Adapter, locations: Locations) -> list[WeightRows]:
    """The rows that an update changes: its module's and, for trained tokens, those of a weight tied to it, unless the
    adapter has tokens for that one too.
    """
    if not isinstance(update, Tokens):
        return [rows]
    holder = locations.ties.get(rows.tensor, rows.tensor)
    group = [holder, *(user for user, h in locations.ties.items() if h == holder)]
    own = {locations.modules[m].tensor for m in adapter.updates}
    return [rows, *(rows._replace(tensor=n) for n in group if n not in own)]


def check_mergeable(weight: float, adapter: Adapter, called: str = "the adapter") -> list[str]:
    """Return warnings for what a merge leaves out. Raises AdapterError if the adapter changes no weight, or has saved
    weights that would have to be scaled. `called`: its name in messages.
    """
    tokens = listing(adapter.embeddings, 3)
    if adapter.embeddings and not adapter.updates and not adapter.saved:
        raise AdapterError(
            f"{called} holds only textual-inversion embeddings ({tokens}), which change no weight: there is nothing to "
            "merge"
        )
    if adapter.saved and weight != 1:
        raise AdapterError(
            f"{called} has saved weights ({listing(adapter.saved, 3)}), which cannot be scaled; its weight is "
            f"{weight:g}\n"
            "  merge it with weight 1"
        )
    if not adapter.saved and (weight == 0 or all(u.is_zero() for u in adapter.updates.values())):
        why = "its weight is 0" if weight == 0 else "was it saved before training?"
        raise AdapterError(
            f"{called} changes nothing: its update is zero everywhere, so there is nothing to merge\n  {why}"
        )
    if adapter.embeddings:
        return [
            f"textual-inversion embeddings ({tokens}) change no weight and are not in OUT: give them to the program "
            "as separate files"
        ]
    return []


def _check_new(name: str, base: Base, rename: Renaming) -> None:
    """Raise TargetError unless a saved weight that the base lacks is a new head, part of no module of the base."""
    renamed = rename(name)
    module = renamed.rpartition(".")[0]
    siblings = [t for t in base.tensors if t.rpartition(".")[0] == module]
    alike = [t for t in base.tensors if t.endswith(f".{name}") or name.endswith(f".{t}")]
    if siblings or alike or base.single_file:
        what = (
            f"its '{module}' has only {listing(siblings, 3)}"
            if siblings
            else f"it has {listing(alike or list(base.tensors), 3)}"
        )
        raise TargetError(
            f"saved weight '{name}' is not in {base.folder}; {what}\n  is it an adapter for another model?"
        )
