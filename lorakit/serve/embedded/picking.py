"""Pick each row's next token as its own request asks, for all rows of a batch at once.

    picking = Picking(sampling, prompt_ids, grammar, device)       # the state of one answer
    picked = pick(logits, [picking, ...])                          # one Picked a row; the state moves on

Order of what is done to the logits, as in vLLM: logit bias and grammar, penalties (`penalties`), temperature, then
min_p, top_k and top_p (`truncation`), then the draw. Log probabilities that are reported are those of the raw logits.

A row is computed from its own logits, settings and random numbers alone, so its answer does not depend on the other
rows of the batch. A draw takes one uniform number u and returns the first token whose cumulative probability exceeds u
(inverse transform sampling); the Gumbel trick would take a number for each token of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import Finish, Sampling, TokenLogprob
from ..errors import EngineFailed
from .grammar import Matcher, forbid
from .penalties import Penalties, penalise
from .truncation import keep_likely

_UNIFORM_BITS = 24  # a float32 in [0, 1) holds as many; its product with a float32 total is always below the total
_COLDEST = 1e-30  # float32 rounds much smaller temperatures to 0
_LEAST_LOGPROB = -9999.0  # OpenAI's value for what is as good as impossible; JSON has no -inf


@dataclass(frozen=True)
class Picked:
    """What one step added to an answer.

    id: a token of the answer; None if it ended before it, with a stop token or an error. logprob: that token's, if the
    request asked for them. finish: why the answer ends with this step, None if it goes on. error: why it cannot go on.
    """

    id: int | None
    logprob: TokenLogprob | None = None
    finish: Finish | None = None
    error: EngineFailed | None = None


class Picking:
    """The state of one answer: how many tokens it has, how often each, its random numbers, where its grammar stands."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], grammar: Matcher | None, device: torch.device | str
    ):
        """Start an answer.

        prompt_ids: for the repetition penalty. grammar: of `sampling.schema`, from `Grammars.matcher`; it belongs to
        this answer alone. device: where the logits will be.
        """
        self.sampling = sampling
        self.grammar = grammar
        self.length = 0  # tokens of the answer
        self.greedy = sampling.temperature == 0
        self.ends = sampling.stop_ids if grammar is None else sampling.stop_ids | grammar.ends
        self.penalties = Penalties.of(sampling, prompt_ids)
        self.bias: tuple[Tensor, Tensor] | None = None  # tokens and what is added, both [entries]
        if sampling.logit_bias:
            tokens, added = zip(*sampling.logit_bias, strict=True)
            self.bias = torch.tensor(tokens, device=device), torch.tensor(added, dtype=torch.float32, device=device)
        # Seeds are 64-bit integers in OpenAI's API; Python would take -5 and 5 for the same.
        self._random = random.Random(None if sampling.seed is None else sampling.seed & (2**64 - 1))

    @property
    def adjusts(self) -> bool:
        """Whether this answer's logits are changed before a token is picked."""
        return self.bias is not None or self.penalties is not None or self.grammar is not None

    def uniform(self) -> float:
        """Return the answer's next random number, in [0, 1)."""
        return self._random.getrandbits(_UNIFORM_BITS) / (1 << _UNIFORM_BITS)

    def add(self, token: int, logprob: TokenLogprob | None) -> Picked:
        """Add the token picked for this answer, and say whether the answer ends."""
        if token in self.ends:
            return Picked(None, finish="stop")
        self.length += 1
        if self.penalties is not None:
            self.penalties.add(token)
        finish: Finish | None = "length" if self.length >= self.sampling.max_tokens else None
        if self.grammar is not None:
            error = self.grammar.add(token)
            if error is not None:
                return Picked(None, error=error)
            if self.grammar.ended:
                finish = "stop"
        return Picked(token, logprob, finish)


def pick(logits: Tensor, rows: Sequence[Picking]) -> list[Picked]:
    """Pick the next token of each row and move its state on. logits: [rows, vocab], float32; not changed.

    A row whose logits are not finite, or whose grammar or bias leaves no token, gets an `error`; the others go on.
    """
    top, ids = logits.max(-1)  # NaN if any of the row is NaN, so one pass tells greedy picks and broken rows
    scores = logits
    if any(row.adjusts for row in rows):
        scores = _adjusted(logits, rows)
        left, ids = scores.max(-1)
        top = torch.where(top.isfinite(), left, top)
    drawn = [at for at, row in enumerate(rows) if not row.greedy]
    if len(drawn) == len(rows):
        ids = _draw(scores, rows)
    elif drawn:
        index = torch.tensor(drawn, device=logits.device)
        ids[index] = _draw(scores[index], [rows[at] for at in drawn])
    tokens, usable = torch.stack((ids, top.isfinite().long())).tolist()  # one transfer from the device
    logprobs = _logprobs(logits, ids, rows)
    return [
        row.add(token, logprob) if good else Picked(None, error=_unusable(row))
        for row, token, good, logprob in zip(rows, tokens, usable, logprobs, strict=True)
    ]


def _adjusted(logits: Tensor, rows: Sequence[Picking]) -> Tensor:
    scores = logits.clone()
    for at, row in enumerate(rows):
        if row.bias is not None:
            scores[at].index_add_(0, *row.bias)
    grammars = [(at, row.grammar, row.ends) for at, row in enumerate(rows) if row.grammar is not None]
    if grammars:
        forbid(scores, grammars)
    penalties = [(at, row.penalties) for at, row in enumerate(rows) if row.penalties is not None]
    if penalties:
        penalise(scores, penalties)
    return scores


def _draw(scores: Tensor, rows: Sequence[Picking]) -> Tensor:
    """Draw a token for each row, [rows], from softmax(scores / temperature), truncated. scores: [rows, vocab]."""
    device = scores.device
    temperature = torch.tensor([max(row.sampling.temperature, _COLDEST) for row in rows], device=device)[:, None]
    # The maximum is subtracted before the division, so that no temperature, however low, can overflow. In place: new
    # memory for [rows, vocab] costs more than the arithmetic.
    weights = (scores - scores.amax(-1, keepdim=True)).div_(temperature).exp_()  # the likeliest is 1
    weights = keep_likely(weights, [row.sampling for row in rows])
    cumulative = weights.cumsum_(-1)
    uniform = torch.tensor([row.uniform() for row in rows], device=device)[:, None]
    ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return ids.clamp_max_(scores.shape[-1] - 1)  # only a row of NaN gets there; it ends with an error


def _logprobs(logits: Tensor, ids: Tensor, rows: Sequence[Picking]) -> list[TokenLogprob | None]:
    """Return the report of each row that asked for one. ids: [rows], the tokens picked."""
    found: list[TokenLogprob | None] = [None] * len(rows)
    asked = [at for at, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asked:
        return found
    if len(asked) < len(rows):
        index = torch.tensor(asked, device=logits.device)
        logits, ids = logits[index], ids[index]
    counts = [rows[at].sampling.logprobs or 0 for at in asked]
    total = logits.logsumexp(-1, keepdim=True)  # [asked, 1]
    own = (logits.gather(-1, ids[:, None]) - total)[:, 0].clamp_min(_LEAST_LOGPROB).tolist()
    values, tokens = logits.topk(min(max(counts), logits.shape[-1]))  # [asked, most]
    likely = zip((values - total).clamp_min(_LEAST_LOGPROB).tolist(), tokens.tolist(), strict=True)
    for at, count, token, logprob, (high, others) in zip(asked, counts, ids.tolist(), own, likely, strict=True):
        found[at] = TokenLogprob(token, logprob, tuple(zip(others[:count], high[:count], strict=True)))
    return found


def _unusable(row: Picking) -> EngineFailed:
    """Return the error of a row without a finite score."""
    failed = None if row.grammar is None else row.grammar.error()
    if failed is not None:
        return failed
    message = (
        "the model's logits for the next token are NaN or infinite\n"
        "  the adapter's weights or its scale are too large for this precision: try a lower scale, or float32"
    )
    if row.grammar is not None or row.bias is not None:
        message += "\n  or: logit_bias and the schema leave no token that could follow"
    return EngineFailed(message, heals=False)
