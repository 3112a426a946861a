"""Which rows make a batch, and a batch as tensors.

The order of an epoch is a pure function of its arguments, so a resumed run needs only seed, epoch and position to go on
with the same batches. Rows of like length share a batch: less padding is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorakit.data.dataset import Item
from lorakit.errors import ConfigError
from lorakit.ops import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Rows are sorted by length within pools of so many batches: enough to fill batches with like lengths, few enough that
# batches still differ from epoch to epoch.
POOL_BATCHES = 32


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool = True) -> list[list[int]]:
    """The batches of one epoch as row indices, each index once; one batch may be short."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is below 1")
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths)).tolist()
    if not group_by_length:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pool = batch_size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [near[first : first + batch_size] for first in range(0, len(near), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are padded with. It is masked out, so any token serves where there is none for it."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None), 0)


def collate(items: Sequence[Item], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [batch, length], padded on the right to a multiple of `multiple_of`.

    Labels stand at their own position (the loss shifts them) and come from the mask alone: the pad token may well be the
    end token, which is trained where it ends an answer.
    """
    import torch

    if not items:
        raise ConfigError("collate: a batch needs at least one row")
    longest = max(len(item.ids) for item in items)
    length = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(items), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for place, item in enumerate(items):
        ids, trained = torch.tensor(item.ids), torch.tensor(item.trained)
        input_ids[place, : len(ids)] = ids
        attention_mask[place, : len(ids)] = 1
        labels[place, : len(ids)] = ids.where(trained, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
