"""Keys and values of prompts that were computed before, by adapter choice and token ids (a radix tree for each choice).

    found = prefixes.find(choice, ids)             # Found(length, keys_values) of the longest known start, or None
    prefixes.keep(choice, ids, keys_values)        # copies what is not known yet

A choice is the adapters' content hashes with their weights, so a changed file or another weight finds nothing of the
old. Used by the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..engine import Choice

KeysValues = list[tuple[Tensor, Tensor]]  # for each layer: keys and values, each [heads, positions, head_dim]
LEAST = 16  # tokens: a shorter start is computed again as fast as it is copied


@dataclass(frozen=True)
class Found:
    """The first `length` positions of a prompt. The tensors are shared with the cache: to be read, not written."""

    length: int
    keys_values: KeysValues


class Prefixes:
    """Starts of prompts, the most recently used ones, in at most `budget_bytes` (0: nothing is kept)."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.bytes = 0

    def find(self, choice: Choice, ids: Sequence[int]) -> Found | None:
        """Return the longest known start of `ids`, of at least 16 tokens, and never all: the last one is computed."""
        raise NotImplementedError

    def keep(self, choice: Choice, ids: Sequence[int], keys_values: KeysValues) -> None:
        """Remember the positions of `ids`. keys_values: of these positions; more after them are ignored.

        What is new is copied, so the tensors may be views of a buffer that changes later.
        """
        raise NotImplementedError

    def forget(self, key: str) -> int:
        """Drop all that was computed with this adapter. Return the bytes freed."""
        raise NotImplementedError
