"""Buckets never drop a picture: from files to the micro-batches that are computed."""

from __future__ import annotations

from collections import Counter

import pytest
from made_pictures import scene

from lorakit.data.batches import batch_order
from lorakit.data.pictures.read import read_pictures
from lorakit.data.pictures.settings import PictureSettings
from lorakit.train.micro import Limit, micro_batches

SHAPES = [(64, 64), (64, 64), (80, 48), (48, 80), (192, 64), (64, 192), (192, 64)]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SHAPES):
        scene(*size, seed=number).save(folder / f"{number}.png")
    return read_pictures(folder, PictureSettings(caption="a"), resolution=64, multiple=8).items


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("epoch", range(4))
def test_seven_pictures_of_five_shapes_are_each_seen_once_in_every_epoch(items, epoch, at_once):
    groups = [item.group for item in items]
    assert len(set(groups)) == 5
    batches = batch_order([item.size for item in items], 4, seed=1, epoch=epoch, groups=groups)
    assert sorted(map(len, batches)) == [3, 4]
    seen = Counter()
    for batch in batches:
        parts = micro_batches([[items[index] for index in batch]], Limit([at_once], None, None, busy=1))
        for part in parts:
            assert len({item.group for item in part.items}) == 1
            assert len(part.items) <= at_once
            seen.update(item.content for item in part.items)
    assert sorted(seen.values()) == [1] * 7
