"""Penalties for tokens that an answer, or its prompt, has already.

    repetition (Keskar et al. 2019, CTRL; also of the prompt's tokens):  logit / r if it is positive, else logit · r
    then presence p and frequency f (OpenAI; of the answer's tokens):    logit − p · [count > 0] − f · count

Each answer keeps a list of its distinct tokens and their counts as arrays that grow, so that a step gathers and
scatters a few hundred logits for all rows together rather than going over the vocabulary for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..engine import Sampling


class Penalties:
    """What one answer's tokens cost it. `tokens`, `counts`: [distinct tokens]; the count is of the answer alone."""

    def __init__(self, sampling: Sampling, tokens: Iterable[int] = ()):
        self.repetition = sampling.repetition
        self.presence = sampling.presence
        self.frequency = sampling.frequency
        self._places = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
        self._tokens = np.fromiter(self._places, np.int64)
        self._counts = np.zeros(len(self._places), np.float32)

    @classmethod
    def of(cls, sampling: Sampling, prompt_ids: Sequence[int]) -> Penalties | None:
        """Return the penalties of an answer that starts, None if the request has none."""
        if sampling.repetition != 1:
            return cls(sampling, prompt_ids)
        return cls(sampling) if sampling.presence or sampling.frequency else None

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):  # no room: twice as much
            room = max(64, len(self._tokens))
            self._tokens = np.concatenate((self._tokens, np.zeros(room, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
        self._tokens[place] = token
        self._counts[place] += 1

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: len(self._places)]

    @property
    def subtracted(self) -> np.ndarray:
        """Presence and frequency penalty of each token, [distinct tokens]."""
        counts = self._counts[: len(self._places)]
        return self.presence * (counts > 0).astype(np.float32) + self.frequency * counts


def penalise(scores: Tensor, rows: Sequence[tuple[int, Penalties]]) -> None:
    """Apply the penalties of each (row, penalties) to `scores`, [all rows, vocab], in place."""
    sizes = [len(penalties.tokens) for _, penalties in rows]
    at = np.repeat(np.array([row for row, _ in rows]), sizes)
    tokens = np.concatenate([penalties.tokens for _, penalties in rows])
    repetition = np.repeat(np.array([penalties.repetition for _, penalties in rows], np.float32), sizes)
    subtracted = np.concatenate([penalties.subtracted for _, penalties in rows]).astype(np.float32)
    where, columns, factor, less = (torch.from_numpy(a).to(scores.device) for a in (at, tokens, repetition, subtracted))
    old = scores[where, columns]  # [distinct tokens of all rows]
    scores[where, columns] = torch.where(old > 0, old / factor, old * factor) - less
