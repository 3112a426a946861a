"""A picture as training sees it: pixels, crops, and draws that depend on seed and epoch alone."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_pictures import scene
from PIL import Image

from lorakit.data.pictures.item import Chances, Mask, PictureItem
from lorakit.errors import DataError


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def item_of(image: Image.Image, bucket: tuple[int, int], **other) -> PictureItem:
    data = png(image)
    content = hashlib.sha256(data).hexdigest()
    return PictureItem("a.png", other.pop("caption", "a, b, c, d"), bucket, image.size, content, lambda: data, **other)


def as_array(pixels: torch.Tensor) -> np.ndarray:
    """[3, H, W] in −1..1 to [H, W, 3] in 0..255."""
    return ((pixels.permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)


def test_pixels_of_a_bucket_of_the_same_size_are_the_files_own():
    pixels = item_of(scene(48, 32), (48, 32)).pixels()
    assert (pixels.dtype, pixels.shape, pixels.min() >= -1, pixels.max() <= 1) == (
        torch.float32,
        (3, 32, 48),
        True,
        True,
    )
    np.testing.assert_array_equal(as_array(pixels), np.asarray(scene(48, 32)))


def test_a_crop_is_the_middle_and_a_flip_mirrors_it():
    item = item_of(scene(64, 32), (32, 32), chances=Chances(flip=True))
    middle = np.asarray(scene(64, 32))[:, 16:48]
    np.testing.assert_array_equal(as_array(item.pixels()), middle)
    flipped = next(drawn for drawn in (item.drawn(0, epoch) for epoch in range(20)) if drawn.flip)
    np.testing.assert_array_equal(as_array(item.pixels(flipped)), middle[:, ::-1])
    assert item.cropped == 0.5


def test_reducing_keeps_the_mean_of_each_area():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 200
    found = as_array(item_of(Image.fromarray(pixels), (8, 8)).pixels()).astype(float)
    areas = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))  # what a box filter gives
    assert np.abs(found - areas)[[0, 1, 6, 7]].max() <= 4  # Lanczos overshoots a little next to an edge
    assert abs(found.mean() - areas.mean()) < 1


def test_stretching_cuts_nothing():
    item = item_of(scene(64, 32), (32, 32), chances=Chances(crop="stretch"))
    assert item.cropped == 0
    assert item.plain.box == (0, 0, 64, 32)
    columns = as_array(item.pixels())[8, :, 0].astype(int)
    assert columns[0] < 10
    assert columns[-1] > 240


def test_random_crops_are_at_nine_places_from_edge_to_edge():
    item = item_of(scene(301, 97), (96, 96), chances=Chances(crop="random"))
    counts = Counter(item.drawn(3, epoch).box for epoch in range(900))
    boxes = list(counts)
    assert len(boxes) == 9  # few enough for all of them to be cached
    assert all(50 < count < 160 for count in counts.values())
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 301
        assert 0 <= top < bottom <= 97
        assert (right - left) == pytest.approx(bottom - top)
    assert item.pixels(item.drawn(3, 0)).shape == (3, 96, 96)
    assert min(box[0] for box in boxes) == 0
    assert max(box[2] for box in boxes) == 301


ALL = Chances(flip=True, crop="random", caption_dropout=0.3, shuffle_tags=True, keep_tags=1)


def test_tags_come_in_sixteen_orders():
    item = item_of(scene(), (48, 32), caption="a, b, c, d, e, f, g", chances=Chances(shuffle_tags=True))
    captions = {item.drawn(0, epoch).caption for epoch in range(500)}
    assert len(captions) == 16  # few enough for all of them to be cached
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {tuple("abcdefg")}


def test_what_is_drawn_depends_on_seed_and_epoch_alone():
    item = item_of(scene(64, 32), (32, 32), chances=ALL)
    before = [item.drawn(seed, epoch) for seed in range(3) for epoch in range(5)]
    torch.manual_seed(1)
    np.random.seed(1)
    moved = replace(item, where="elsewhere/b.png")
    assert [moved.drawn(seed, epoch) for seed in range(3) for epoch in range(5)] == before
    assert len(set(before)) > 10


def test_repeats_and_other_pictures_are_drawn_apart():
    item = item_of(scene(64, 32), (32, 32), chances=ALL)
    others = [replace(item, repeat=1), item_of(scene(64, 32, seed=1), (32, 32), chances=ALL)]
    for other in others:
        assert [item.drawn(0, e) for e in range(8)] != [other.drawn(0, e) for e in range(8)]


def test_a_setting_does_not_change_what_another_one_draws():
    item = item_of(scene(64, 32), (32, 32), chances=ALL)
    flips = [item.drawn(0, epoch).flip for epoch in range(20)]
    only_flip = replace(item, chances=Chances(flip=True))
    assert [only_flip.drawn(0, epoch).flip for epoch in range(20)] == flips
    assert {only_flip.drawn(0, epoch).caption for epoch in range(20)} == {item.caption}


def test_shares_of_flips_and_empty_captions_are_those_asked_for():
    item = item_of(scene(64, 32), (32, 32), chances=ALL)
    drawn = [item.drawn(0, epoch) for epoch in range(2000)]
    assert sum(d.flip for d in drawn) / 2000 == pytest.approx(0.5, abs=0.04)
    assert sum(d.caption == "" for d in drawn) / 2000 == pytest.approx(0.3, abs=0.04)


def test_a_mask_is_cropped_and_mirrored_with_its_picture():
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 32, 32))  # the left half of the middle crop
    data = png(mask)
    item = item_of(scene(64, 32), (32, 32), chances=Chances(flip=True), mask=Mask("m.png", "x", lambda: data))
    left = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], dim=2)
    assert torch.equal(item.mask_pixels(), left)
    flipped = next(drawn for drawn in (item.drawn(0, epoch) for epoch in range(20)) if drawn.flip)
    assert torch.equal(item.mask_pixels(flipped), left.flip(2))
    assert item_of(scene(), (48, 32)).mask_pixels() is None


def test_a_mask_of_another_size_covers_the_same_part():
    mask = Image.new("L", (16, 8), 0)
    mask.paste(255, (0, 0, 8, 8))
    data = png(mask)
    found = item_of(scene(64, 32), (64, 32), mask=Mask("m.png", "x", lambda: data)).mask_pixels()
    assert found[0, :, :32].min() == 1
    assert found[0, :, 32:].max() == 0


def test_the_opacity_of_a_picture_is_its_mask():
    image = scene(32, 32).convert("RGBA")
    alpha = Image.new("L", (32, 32), 255)
    alpha.paste(0, (0, 0, 16, 32))
    image.putalpha(alpha)
    found = item_of(image, (32, 32), mask=Mask(content="alpha")).mask_pixels()
    assert found[0, :, :16].max() == 0
    assert found[0, :, 16:].min() == 1


def test_the_digest_covers_what_affects_training_and_not_where_the_file_is():
    item = item_of(scene(), (48, 32))
    changes = [
        {"caption": "another"},
        {"group": (32, 32)},
        {"content": "0" * 64},
        {"chances": Chances(flip=True)},
        {"chances": Chances(caption_dropout=0.1)},
        {"repeat": 1},
        {"is_prior": True},
        {"mask": Mask("m.png", "x", None)},
        {"background": (0, 0, 0)},
        {"weight": 2},
    ]
    digests = {item.digest(), *(replace(item, **change).digest() for change in changes)}
    assert len(digests) == len(changes) + 1
    assert replace(item, where="elsewhere.png").digest() == item.digest()


def test_a_file_that_has_gone_is_named(tmp_path):
    item = replace(item_of(scene(), (48, 32)), read=(tmp_path / "gone.png").read_bytes)
    with pytest.raises(DataError, match=r"a\.png: cannot be read: No such file"):
        item.pixels()
