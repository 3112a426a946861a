"""Group rows into batches, and collate a batch into tensors.

The order of an epoch is a pure function of its arguments, so a resumed run gets the same batches from seed, epoch and
position alone. Rows of similar length share a batch, which saves padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.data.dataset import Item
from lorakit.errors import ConfigError
from lorakit.ops import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Rows are sorted by length within pools of this many batches: large enough that lengths in a batch are similar, small
# enough that batches still differ between epochs.
POOL_BATCHES = 32


def batch_order(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
    groups: Sequence[Any] | None = None,
) -> list[list[int]]:
    """Return the batches of one epoch as lists of row indices.

    lengths: tokens per row; groups: rows of one group share a batch where possible (pictures of one shape). Every row
    occurs once, and at most one batch has fewer than `batch_size` rows. Raises ConfigError for a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is below 1")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)).tolist()
    if not group_by_length:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pool = batch_size * POOL_BATCHES
    batches = []
    place = {group: number for number, group in enumerate(dict.fromkeys(groups or ()))}
    number = [0] * len(lengths) if groups is None else [place[group] for group in groups]
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda index: (number[index], lengths[index]))
        batches += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are padded with. It is masked out, so any token serves where there is none for it."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None), 0)


def collate(items: Sequence[Item], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each [batch, length].

    length: the longest item's, rounded up to a multiple of `multiple_of`; shorter items are padded on the right.

    Labels are not shifted (the loss does that). They come from the items' loss mask, never from comparing ids with
    `pad_id`: the pad token may be the end token, which is trained where it ends an answer. Raises ConfigError if there
    are no items.
    """
    import torch

    if not items:
        raise ConfigError("collate: a batch needs at least one row")
    longest = max(len(item.ids) for item in items)
    length = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(items), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, item in enumerate(items):
        ids, trained = torch.tensor(item.ids), torch.tensor(item.trained)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.where(trained, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
