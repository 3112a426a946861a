"""Vectors of texts, and what they are compared by.

    v = Σ w_t h_t / |Σ w_t h_t|         h: last hidden states [length, width]; w by pooling: mean, cls or last
    contrast   −log softmax(v_i · c / τ)[i] over all candidates c of the batch: every row's positive, all negatives
               (InfoNCE, van den Oord et al. 2018; in-batch negatives as in Karpukhin et al. 2020)
    score      (v · v' − s)²            s: the pair's score, 0 to 1

A candidate that equals a row's own positive, or that is the positive of the same anchor in another row, is no negative
of that row: it is masked. A batch is always contrasted as a whole. Its texts are encoded in portions, each computed
again in backward (as GradCache does, Gao et al. 2021), so memory is that of one portion and the loss does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ...data.contrasts import ContrastItem

# Texts of a batch up to this many tokens (with padding) are encoded at once. Beyond, portions cost a second forward.
TOKENS_AT_ONCE = 1 << 15


def pooled(texts: Sequence[Sequence[int]], pooling: str, pad: int, multiple_of: int = 8) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `pool` [texts, length], padded on the right; each row of `pool`: w."""
    length = -(-max(map(len, texts)) // multiple_of) * multiple_of
    ids = torch.full((len(texts), length), pad)
    mask, pool = torch.zeros_like(ids), torch.zeros(ids.shape)
    for place, text in enumerate(texts):
        ids[place, : len(text)] = torch.tensor(text)
        mask[place, : len(text)] = 1
        if pooling == "mean":
            pool[place, : len(text)] = 1 / len(text)
        else:
            pool[place, 0 if pooling == "cls" else len(text) - 1] = 1
    return {"input_ids": ids, "attention_mask": mask, "pool": pool}


def masked(items: Sequence[ContrastItem]) -> Tensor:
    """Return which candidates are no negatives of a row, though they are not its own: [rows, candidates], bool.

    Candidates are the rows' positives, then all negatives, in the rows' order.
    """
    candidates = [item.texts[1] for item in items] + [text for item in items for text in item.texts[2:]]
    right: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for item in items:
        right.setdefault(item.texts[0], set()).add(item.texts[1])
    return torch.tensor(
        [
            [column != row and candidate in right[item.texts[0]] for column, candidate in enumerate(candidates)]
            for row, item in enumerate(items)
        ]
    )


def encoded(model: Any, batch: Mapping[str, Tensor], at_once: int = TOKENS_AT_ONCE) -> Tensor:
    """Return a vector of length 1 for each text: [texts, width], float32. `at_once`: tokens of a portion."""
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "pool")]
    texts, length = inputs[0].shape
    size = max(1, at_once // length)
    if texts <= size:
        return _vectors(model, *inputs)
    portions = zip(*(tensor.split(size) for tensor in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_vectors(model, *portion) for portion in portions])
    made: list[Any] = [checkpoint(_vectors, model, *portion, use_reentrant=False) for portion in portions]
    return torch.cat(made)


def _vectors(model: nn.Module, ids: Tensor, mask: Tensor, pool: Tensor) -> Tensor:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # [texts, length, width]
    return F.normalize((pool[:, None] @ hidden.float())[:, 0], dim=-1)


def contrast_losses(anchors: Tensor, candidates: Tensor, hidden: Tensor, temperature: Tensor) -> Tensor:
    """Return InfoNCE of each row: [rows]. hidden: [rows, candidates], what is left out. Candidate i is row i's own."""
    logits = (anchors @ candidates.T / temperature).masked_fill(hidden, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=logits.device), reduction="none")


def score_losses(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """Return (cosine − score)² of each pair: [rows]."""
    return ((first * second).sum(1) - scores).square()
