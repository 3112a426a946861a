"""Trained rows of an embedding, as a value: new weights for some tokens (PEFT's trainable tokens).

    W'[ids[i]] = weight[i]        W: [vocab, dim]   ids: n token ids   weight: [n, dim]

The rows are the new values themselves, not changes of the old ones, so that they also fit an embedding that was given
rows for new tokens, which hold anything. Of a linear output layer, [vocab, dim], the ids are outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors, wide
from .lora import FactorShapes
from .update import Read, Rows, Update

if TYPE_CHECKING:
    from .lora import Kind


@dataclass(frozen=True)
class Tokens(Update):
    """`ids`: ascending; `weight`: their rows; `kind`: "embedding", or "linear" for an output layer."""

    ids: tuple[int, ...]
    weight: Tensor
    kind: Kind = "embedding"

    @property
    def variant(self) -> str:
        return "tokens"

    @property
    def rank(self) -> int:
        """The number of tokens: ΔW has no larger rank."""
        return len(self.ids)

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def needs_base(self) -> bool:
        return True

    def check(self, module: str) -> None:
        """AdapterError unless there is a finite row for each id, and the ids are ascending."""
        where = f"adapter factors of '{module}'"
        check_tensors(module, {"weight": self.weight})
        if self.weight.dim() != 2 or len(self.ids) != self.weight.shape[0]:
            raise AdapterError(
                f"{where}: rows {list(self.weight.shape)} for {len(self.ids)} tokens; expected [{len(self.ids)}, dim]"
            )
        if list(self.ids) != sorted(set(self.ids)) or self.ids[0] < 0:
            raise AdapterError(f"{where}: token ids {list(self.ids)[:8]}; expected each once, ascending, from 0")

    def is_zero(self) -> bool:
        """Never certain: it depends on the base's rows."""
        return False

    def times(self, weight: float, module: str) -> Tokens:
        raise AdapterError(
            f"'{module}' has trained tokens, whose rows replace the base's: there is no multiple of them\n"
            "  activate the adapter with a weight instead"
        )

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        """The smallest that has these ids."""
        vocabulary, dim = self.ids[-1] + 1, self.weight.shape[1]
        return (dim, vocabulary) if self.kind == "embedding" else (vocabulary, dim)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        raise AdapterError("the change that trained tokens make depends on the base's rows: it has no ΔW of its own")

    def without_base(self) -> Update:
        """The rows themselves, as a matrix."""
        from .dense import Dense

        return Dense(self.weight)

    def factor_shapes(self, module: str) -> FactorShapes:
        raise AdapterError(
            f"'{module}' has trained tokens: their rows replace the base's, so they cannot be added or cut\n"
            "  merge the adapter into its base first, then extract the change: lorakit merge, lorakit extract"
        )

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        """A weight [vocab, dim] is transposed for an embedding, whose ids are inputs; [dim, vocab] for a linear."""
        dim, last = self.weight.shape[1], self.ids[-1]
        if len(shape) != 2:
            return None
        if shape[1] == dim and shape[0] > last:
            return self.kind == "embedding"
        return self.kind != "embedding" if shape[0] == dim and shape[1] > last else None

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        own, ids = wide(self.weight), torch.tensor(self.ids, device=self.weight.device)
        if (self.kind == "embedding") != transposed:  # [dim, vocab]: an id is a column

            def columns(rows: slice, block: Tensor) -> Tensor:
                change = torch.zeros_like(block, dtype=torch.promote_types(block.dtype, own.dtype))
                change[:, ids] = weight * (own.T[rows] - block[:, ids])
                return change

            return columns

        def of(rows: slice, block: Tensor) -> Tensor:
            change = torch.zeros_like(block, dtype=torch.promote_types(block.dtype, own.dtype))
            inside = (ids >= rows.start) & (ids < rows.stop)
            at = ids[inside] - rows.start
            change[at] = weight * (own[inside] - block[at])
            return change

        return of

    # Some outputs of a module

    def halves_swapped(self) -> Update:
        if self.kind != "embedding":
            raise AdapterError("an output layer's rows are tokens: they have no halves")
        return replace(self, weight=torch.cat(self.weight.chunk(2, dim=1)[::-1], dim=1))
