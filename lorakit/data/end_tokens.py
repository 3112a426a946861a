"""Where an answer ends: which token a model learns to stop with.

own        the tokens that end generation today: the tokenizer's end token and the model's (generation_config.json)
written    the token a chat template ends answers with, where it is none of those; generation must stop there too
seam       a template may leave the end to the next turn, as GLM's do: the role token after an answer ends generation
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lorakit.data.template_forms import TemplateForms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that stand for a marker rather than for text."""
    try:
        added = tokenizer.get_added_vocab().values()
    except (NotImplementedError, AttributeError):  # Mistral's own tokenizers have special tokens only
        added = ()
    return {*added, *tokenizer.all_special_ids}


class EndTokens:
    """The tokens that end an answer of one template (None: texts without a template)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: Collection[int], forms: TemplateForms | None):
        self._tokenizer, self.own, self._forms = tokenizer, frozenset(own), forms
        self._blank: dict[int, bool] = {}
        self._seams: dict[bool, int | None] = {}
        self.written = None if forms is None else self._written(forms.after_answer)
        self.all = self.own if self.written is None else self.own | {self.written}

    def stop(self, ids: Sequence[int]) -> int | None:
        """Return the index just after the end token of an answer's ids.

        None if they have none, or if more than whitespace follows it. Of several, as in "<|end|>\\n<|endoftext|>", it
        is the first: generation goes no further.
        """
        found = None
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self.all:
                found = index + 1
            elif not self._is_blank(ids[index]):
                break
        return found

    def seam(self, after_call: bool) -> int | None:
        """Return the end token that the turn after an answer begins with, None if it begins with another token.

        after_call: the answer calls a tool, so that the next turn is the tool's.
        """
        if after_call not in self._seams:
            text = "" if self._forms is None else self._forms.next_result if after_call else self._forms.next_turn
            ids = self._tokenizer.encode(text.lstrip(), add_special_tokens=False, verbose=False)
            found = ids[0] if ids and ids[0] in self.own else None
            self._seams[after_call] = self.seam(False) if found is None and after_call else found
        return self._seams[after_call]

    def _written(self, suffix: str) -> int | None:
        """Return the last added token of what a template writes after an answer, None if an end token is there."""
        ids = self._tokenizer.encode(suffix, add_special_tokens=False, verbose=False)
        if self.own & set(ids):
            return None
        added = added_tokens(self._tokenizer)
        for token in reversed(ids):
            if token in added:
                return token
            if not self._is_blank(token):
                return None
        return None

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]
