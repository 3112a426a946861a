"""The order of an epoch and the tensors of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.batches import batch_order, collate
from lorakit.data.dataset import Item, build
from lorakit.data.parse import Row
from lorakit.errors import ConfigError
from lorakit.ops import IGNORE_INDEX

ROW = Row({}, "data.jsonl", 1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 99), max_size=200), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.booleans()
)
def test_an_epoch_has_every_row_once_and_at_most_one_short_batch(lengths, batch_size, seed, epoch, grouped):
    batches = batch_order(lengths, batch_size, seed, epoch, grouped)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert batches == batch_order(lengths, batch_size, seed, epoch, grouped)


def test_rows_of_one_group_share_batches_but_at_the_end_of_a_group():
    groups = ["wide", "tall", "square"] * 7
    batches = batch_order([1] * 21, 4, 0, 0, True, groups)
    assert sorted(index for batch in batches for index in batch) == list(range(21))
    mixed = [batch for batch in batches if len({groups[index] for index in batch}) > 1]
    assert len(mixed) <= 2
    assert batches != batch_order([1] * 21, 4, 0, 1, True, groups)


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 101))
    orders = [batch_order(lengths, 4, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_grouping_by_length_saves_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(10, 200, size=1000).tolist()

    def padding(grouped):
        batches = batch_order(lengths, 8, seed=0, epoch=0, group_by_length=grouped)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) - sum(lengths)

    assert padding(True) < 0.2 * padding(False)


def test_grouped_batches_are_shuffled():
    lengths = list(range(1, 129))
    firsts = [lengths[batch[0]] for batch in batch_order(lengths, 4, seed=0, epoch=0)]
    assert firsts != sorted(firsts)


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        batch_order([1, 2], 0, 0, 0)


def test_collate_pads_on_the_right_to_a_multiple_and_labels_only_what_is_trained():
    batch = collate([Item([5, 6, 7], [False, True, True], ROW), Item([8], [True], ROW)], pad_id=0, multiple_of=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, 6, 7, IGNORE_INDEX],
        [8, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


@pytest.mark.parametrize("length, padded", [(1, 8), (8, 8), (9, 16)])
def test_the_default_multiple_is_eight(length, padded):
    assert collate([Item([1] * length, [True] * length, ROW)], pad_id=0)["input_ids"].shape == (1, padded)


def test_where_pad_is_the_end_token_the_end_is_trained_and_padding_is_not(make_tokenizer, rows):
    t = make_tokenizer(pad="</s>")
    assert t.pad_token_id == t.eos_token_id
    data = build(
        rows({"prompt": "the ", "completion": "dog"}, {"prompt": "the quick ", "completion": "brown fox jumps"}), t
    )
    batch = collate(data.items, t.pad_token_id)
    for place, item in enumerate(data.items):
        last = len(item.ids) - 1
        assert batch["labels"][place, last] == t.eos_token_id
        assert batch["attention_mask"][place, last] == 1
        assert (batch["labels"][place, last + 1 :] == IGNORE_INDEX).all()
        assert (batch["input_ids"][place, last + 1 :] == t.eos_token_id).all()
        assert (batch["labels"][place] != IGNORE_INDEX).sum() == sum(item.trained)


def test_an_empty_batch_is_refused():
    with pytest.raises(ConfigError, match="at least one row"):
        collate([], pad_id=0)
