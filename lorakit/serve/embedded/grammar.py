"""Hold an answer to a JSON schema: which tokens may come next (llguidance, a parser over token tries).

    grammars = Grammars(tokenizer, ends=...)
    matcher = grammars.matcher('{"type": "object", ...}')     # off the engine's thread; cached; one for each answer
    forbid(scores, [(row, matcher, end_ids), ...])            # in the engine's thread

JSON is written without spaces between its parts: a small model that may write white space fills its answer with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import EngineFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Matcher:
    """Where one answer stands in its grammar. `ends`: tokens that end it, where the grammar lets it end."""

    ends: frozenset[int]

    @property
    def ended(self) -> bool:
        """Whether the answer is whole, and no token can follow."""
        raise NotImplementedError

    def add(self, token: int) -> EngineFailed | None:
        """Go on by a token. Return an error if the grammar has become too complex to go on."""
        raise NotImplementedError


class Grammars:
    """The compiled grammars of a tokenizer, the most recently used ones kept. May be called from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = (), kept: int = 64):
        """Nothing is built before the first schema. ends: end tokens of the base, used where a request names none."""
        raise NotImplementedError

    def matcher(self, schema: str) -> Matcher:
        """Return a fresh matcher for an answer.

        It takes from microseconds (a schema seen before) to about a second, so it is not for the engine's thread.
        Raises Cannot("schema") for a schema that is not valid, not supported or too complex, and without llguidance.
        """
        raise NotImplementedError


def forbid(scores: Tensor, rows: Sequence[tuple[int, Any, Collection[int]]]) -> None:
    """Set to -inf the logits of tokens that a grammar does not allow, in place. rows: (row, matcher, its end tokens)."""
    raise NotImplementedError
