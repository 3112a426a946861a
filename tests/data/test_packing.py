"""Packed rows: where each one lies, what is trained of it, and how much padding that leaves."""

from __future__ import annotations

import pytest
import tiny_lm
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.packing import collate_packed, padding, sequences
from lorakit.errors import ConfigError
from lorakit.ops import IGNORE_INDEX

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(SIZES)
def test_every_row_is_in_one_sequence_and_the_batch_is_no_larger_than_the_padded_one(sizes):
    packed, length = sequences(sizes)
    padded = -(-max(sizes) // 8) * 8
    assert sorted(index for indices in packed for index in indices) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in indices) <= length for indices in packed)
    assert length % 8 == 0
    assert len(packed) * length <= len(sizes) * padded
    assert len(packed) * length**2 <= 2 * len(sizes) * padded**2


@given(SIZES.filter(lambda sizes: max(sizes) > 1))
def test_a_packed_batch_holds_each_rows_ids_positions_and_labels(sizes):
    items = tiny_lm.items([max(2, size) for size in sizes])
    batch = collate_packed(items, tiny_lm.PAD)
    assert batch["sizes"].tolist() == [item.size for item in items]
    assert batch["input_ids"].shape[1] % 8 == 0
    real = 0
    for index, item in enumerate(items):
        at = batch["row"] == index
        if index == 0:  # padding says row 0 too
            at &= batch["input_ids"] != tiny_lm.PAD
        assert batch["input_ids"][at].tolist() == item.ids
        assert batch["position_ids"][at].tolist() == list(range(item.size))
        trained = batch["labels"][at] != IGNORE_INDEX
        assert trained.tolist() == [False, *item.trained[1:]]
        assert batch["labels"][at][trained].tolist() == [t for t, m in zip(item.ids[1:], item.trained[1:]) if m]
        real += item.size
    assert int((batch["input_ids"] != tiny_lm.PAD).sum()) == real
    assert (batch["labels"][batch["input_ids"] == tiny_lm.PAD] == IGNORE_INDEX).all()


def test_what_packing_saves_is_counted_in_tokens():
    assert padding([[16, 8, 8]]) == (32, 48, 32)
    tokens, padded, packed = padding([[30, 45, 96, 40, 33, 60, 52, 71] * 4])
    assert tokens / padded < 0.6
    assert tokens / packed > 0.93
    assert padding([[16], [16, 15]]) == (47, 48, 48)


def test_no_rows_are_an_error():
    with pytest.raises(ConfigError, match="at least one row"):
        collate_packed([], 0)
