"""Pack several rows into one sequence, without padding between them.

    input_ids      a a a b b 0 0 0        row a, row b, padding at the end
    position_ids   0 1 2 0 1 0 1 2        each row's own, from 0; attention does not cross a restart
    row            0 0 0 1 1 0 0 0        which row a token is of (any, for padding: it has no label)

A batch has the same rows as without packing, in fewer sequences, so loss and gradients are the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorakit.data.dataset import Item
from lorakit.errors import ConfigError
from lorakit.ops import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

# Attention may compute this many times the pairs of the padded batch. With 1 hardly any rows of similar lengths could
# share a sequence: two rows of 0.7 of the longest have twice its pairs.
PAIRS = 2
TRIED = 16  # numbers of sequences: the best is among the few that the pairs of tokens allow


def sequences(sizes: Sequence[int], multiple_of: int = 8) -> tuple[list[list[int]], int]:
    """Divide rows over sequences of one length: (the rows of each, as indices; the length).

    Of the divisions tried, the one with the fewest tokens, padding included. Its tokens, and the pairs of tokens that
    attention computes, stay within what `lorakit plan` counts:

        sequences · length ≤ rows · longest        sequences · length² ≤ 2 · rows · longest²
    """
    longest = _rounded(max(sizes), multiple_of)
    best, best_length = [[index] for index in range(len(sizes))], longest
    pairs = PAIRS * len(sizes) * longest**2
    fewest = max(1, math.ceil(sum(sizes) ** 2 / pairs))
    for count in range(fewest, min(fewest + TRIED, len(sizes))):
        packed = _balanced(sizes, count)
        length = _rounded(max(sum(sizes[index] for index in indices) for indices in packed), multiple_of)
        if count * length**2 <= pairs and count * length < len(best) * best_length:
            best, best_length = packed, length
    return best, best_length


def _balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide rows over `count` sequences of similar length: the longest row left goes to the shortest sequence.

    The longest sequence is at most 4/3 of the shortest possible (Graham 1969).
    """
    packed: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, at) for at in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tokens, at = heapq.heappop(filled)
        packed[at].append(index)
        heapq.heappush(filled, (tokens + sizes[index], at))
    return packed


def _rounded(size: int, multiple_of: int) -> int:
    return -(-size // multiple_of) * multiple_of


def collate_packed(items: Sequence[Item], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `position_ids`, `labels` and `row`, each [sequences, length], and `sizes` [rows].

    length: a multiple of `multiple_of`, see `sequences`. `row`: the index in `items` of each token's
    row; `sizes`: the rows' tokens. No attention mask: models find packed rows by their positions. A row's first token
    has no label, as nothing of the row predicts it. Raises ConfigError if there are no items.
    """
    import torch

    if not items:
        raise ConfigError("collate: a batch needs at least one row")
    sizes = [len(item.ids) for item in items]
    packed, length = sequences(sizes, multiple_of)
    input_ids = torch.full((len(packed), length), pad_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    row = torch.zeros_like(input_ids)
    for sequence, indices in enumerate(packed):
        start = 0
        for index in indices:
            item, end = items[index], start + sizes[index]
            ids, trained = torch.tensor(item.ids), torch.tensor(item.trained)
            trained[0] = False
            input_ids[sequence, start:end] = ids
            position_ids[sequence, start:end] = torch.arange(end - start)
            labels[sequence, start:end] = ids.where(trained, IGNORE_INDEX)
            row[sequence, start:end] = index
            start = end
        position_ids[sequence, start:] = torch.arange(length - start)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": labels,
        "row": row,
        "sizes": torch.tensor(sizes),
    }


def padding(batches: Iterable[Sequence[int]], multiple_of: int = 8) -> tuple[int, int, int]:
    """Return (tokens of all rows, tokens of the batches with padding, tokens of the packed batches with padding).

    `batches`: the sizes of each batch's rows.
    """
    tokens = padded = packed = 0
    for sizes in batches:
        rows, length = sequences(sizes, multiple_of)
        tokens += sum(sizes)
        padded += _rounded(max(sizes), multiple_of) * len(sizes)
        packed += length * len(rows)
    return tokens, padded, packed
