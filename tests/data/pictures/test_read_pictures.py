"""Pictures as items: no caption is ignored, no picture is dropped, and what was done is said."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from made_pictures import scene, write_pictures
from PIL import Image

from lorakit.data.pictures.read import held_out_of, read_pictures
from lorakit.data.pictures.settings import PictureSettings
from lorakit.errors import ConfigError, DataError


def read(folder, resolution=64, multiple=8, **given):
    return read_pictures(folder, PictureSettings(**given), resolution=resolution, multiple=multiple)


def refused(folder, *words, error=DataError, **given):
    with pytest.raises(error) as caught:
        read(folder, **given)
    for word in words:
        assert word in str(caught.value)


def note(data, start):
    return next((count for text, count in data.notes.items() if text.startswith(start)), None)


# ------------------------------------------------------------------------------------- captions


def test_a_missing_caption_is_an_error_that_names_the_picture(tmp_path):
    write_pictures(tmp_path, {"a.png": "one", "b.png": "two", "c.png": None})
    refused(tmp_path, "1 of 3 pictures have no caption", "c.png", ".txt or .caption", "--caption")


def test_no_captions_at_all_is_an_error_with_the_counts_of_each_folder(tmp_path):
    write_pictures(tmp_path, {"10_cat/a.png": None, "10_cat/b.png": None, "dogs/c.png": None, "dogs/d.png": "a dog"})
    refused(
        tmp_path,
        "3 of 4 pictures have no caption",
        "10_cat: 2 pictures, 0 captions",
        "dogs: 2 pictures, 1 captions",
        "kohya's trainer would take the folder's name, 'cat'",
    )


def test_a_table_that_is_not_read_is_named_where_captions_are_missing(tmp_path):
    write_pictures(tmp_path, {"a.png": None})
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    refused(tmp_path, "captions.jsonl is not read: name it metadata.jsonl")


def test_a_default_caption_is_for_those_without_one_and_is_counted(tmp_path):
    write_pictures(tmp_path, {"a.png": "one", "b.png": None}, size=(64, 64))
    data = read(tmp_path, caption="a thing", trigger="sks")
    assert [item.caption for item in data.items] == ["sks, one", "sks, a thing"]
    assert data.notes == {"without a caption of their own, get 'a thing'": 1}


def test_the_shape_has_the_counts_and_the_first_three_captions(tmp_path):
    write_pictures(tmp_path, {f"{name}.png": f"caption {name}" for name in "abcd"})
    shape = read(tmp_path).shape
    assert shape.startswith("4 pictures, 4 captions")
    assert "'caption a' · 'caption b' · 'caption c' ..." in shape
    write_pictures(tmp_path, {"more/x.png": "x"})
    assert f"{tmp_path}: 4 pictures, 4 captions, {tmp_path}/more: 1 picture, 1 caption" in read(tmp_path).shape


def test_tags_that_cannot_be_shuffled_are_noted(tmp_path):
    write_pictures(tmp_path, {"a.png": "no tags"})
    assert note(read(tmp_path, shuffle_tags=True), "shuffle_tags has no effect") == 1
    with pytest.raises(ConfigError, match="give shuffle_tags too"):
        PictureSettings(keep_tags=1)


# ------------------------------------------------------------------------------------- pictures


def test_one_scene_saved_in_many_ways_gives_one_tensor(tmp_path):
    image = scene(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 8
    opaque = image.convert("RGBA")
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "plain.bmp")
    image.save(tmp_path / "lossless.webp", lossless=True)
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    opaque.save(tmp_path / "opaque.png")
    image.save(tmp_path / "marked.png", transparency=(1, 2, 3))
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    data = read(tmp_path, caption="a", resolution=32)
    assert len(data.items) == 7
    first = data.items[0].pixels()
    for item in data.items:
        assert item.group == (32, 32)
        assert torch.equal(item.pixels(), first), item.where


def test_broken_pictures_are_all_named_with_their_count(tmp_path):
    write_pictures(tmp_path, {f"{name}.png": name for name in "abcd"})
    for name in ("b", "d"):
        path = tmp_path / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    refused(tmp_path, "2 of 4 pictures cannot be used", "b.png: broken", "d.png: broken", "--broken skip")
    data = read(tmp_path, broken="skip")
    assert [item.caption for item in data.items] == ["a", "c"]
    assert note(data, "broken, left out") == 2
    for name in ("a", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    refused(tmp_path, "4 of 4 pictures cannot be used", broken="skip")


def test_pictures_of_types_that_cannot_be_read_are_not_left_out_silently(tmp_path):
    write_pictures(tmp_path, {"a.png": "a"})
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    refused(tmp_path, "1 of 2 pictures cannot be used", "phone.HEIC", "convert it to JPEG or PNG")


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path):
    write_pictures(tmp_path, {"a.png": "a"})
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\nsize 1000\n")
    refused(tmp_path, "git-lfs pointer")


def test_seven_pictures_of_five_shapes_are_seven_items_in_five_groups(tmp_path):
    shapes = [(64, 64), (64, 64), (80, 48), (48, 80), (192, 64), (64, 192), (192, 64)]
    for number, size in enumerate(shapes):
        scene(*size, seed=number).save(tmp_path / f"{number}.png")
    data = read(tmp_path, caption="a")
    groups = Counter(item.group for item in data.items)
    assert len(data.items) == len({item.content for item in data.items}) == 7
    assert len(groups) == 5
    assert f"{len(groups)} buckets" in data.length
    for item in data.items:
        assert item.pixels().shape == (3, item.group[1], item.group[0])


def test_a_picture_much_cropped_is_named_with_its_share(tmp_path):
    scene(400, 100).save(tmp_path / "wide.png")
    scene(64, 64).save(tmp_path / "square.png")
    data = read(tmp_path, caption="a", buckets=False)
    assert note(data, "more than 15% is cropped away: wide.png (75%)") == 1
    assert note(read(tmp_path, caption="a", buckets=False, crop="stretch"), "more than") is None


def test_small_pictures_are_named_and_not_enlarged(tmp_path):
    scene(40, 32).save(tmp_path / "small.png")
    data = read(tmp_path, caption="a")
    assert data.items[0].group == (32, 32) or data.items[0].group == (40, 32)
    assert note(data, "smaller than resolution 64, trained at their own size: small.png") == 1
    assert read(tmp_path, caption="a", upscale=True).items[0].size > 64 * 48


def test_copies_are_noted(tmp_path):
    write_pictures(tmp_path, {"a.png": "one"})
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("two")
    data = read(tmp_path)
    assert note(data, "the same file as an earlier one: b.png = a.png") == 1
    assert len(data.items) == 2


def test_the_background_is_the_colour_asked_for(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read(tmp_path, caption="a").items[0].pixels().min() == 1
    assert read(tmp_path, caption="a", background="black").items[0].pixels().max() == -1
    refused(tmp_path, "is no colour", error=ConfigError, background="glass")


# ------------------------------------------------------------------------------------- repeats, prior, masks


def test_kohyas_folder_names_are_repeats_and_said_to_be(tmp_path):
    write_pictures(tmp_path, {"3_cat/a.png": "a", "2024_holiday/b.png": "b"})
    data = read(tmp_path)
    assert Counter(item.caption for item in data.items) == {"a": 3, "b": 1}
    assert [item.repeat for item in data.items if item.caption == "a"] == [0, 1, 2]
    assert note(data, "seen 3 times an epoch, as their folder's name says: 3_cat") == 1
    assert len(data.pictures) == 2


def test_the_source_itself_may_have_kohyas_name(tmp_path):
    write_pictures(tmp_path / "3_cat", {"a.png": "a"})
    assert len(read(tmp_path / "3_cat").items) == 3


def test_repeats_are_set_by_folder(tmp_path):
    write_pictures(tmp_path, {"3_cat/a.png": "a", "dogs/b.png": "b"})
    data = read(tmp_path, repeats={"3_cat": 1, "dogs": 2})
    assert Counter(item.caption for item in data.items) == {"a": 1, "b": 2}
    assert note(data, "seen") is None
    refused(tmp_path, "repeats: 'dog' is no folder", "did you mean 'dogs'", repeats={"dog": 2})
    with pytest.raises(ConfigError, match="seen 0 times"):
        PictureSettings(repeats={"dogs": 0})


def test_prior_pictures_have_the_class_caption_and_no_trigger_word(tmp_path):
    write_pictures(tmp_path / "own", {"a.png": "a sks dog"})
    write_pictures(tmp_path / "class", {"x.png": None, "y.png": "a brown dog"})
    refused(tmp_path / "own", "--prior-caption", prior_data=str(tmp_path / "class"), caption="a")
    data = read(
        tmp_path / "own", prior_data=str(tmp_path / "class"), prior_caption="a dog", trigger="sks", repeats={"own": 2}
    )
    assert [(item.caption, item.is_prior) for item in data.items] == [
        ("a sks dog", False),
        ("a sks dog", False),
        ("a dog", True),
        ("a brown dog", True),
    ]
    assert data.about["pictures"] == 1
    assert data.about["prior"] == 2
    assert note(data, "prior: without a caption") == 1


def test_a_prior_inside_the_data_is_not_data(tmp_path):
    write_pictures(tmp_path, {"a.png": "a", "class/x.png": None})
    data = read(tmp_path, prior_data=str(tmp_path / "class"), prior_caption="a dog")
    assert [item.is_prior for item in data.items] == [False, True]


def test_masks_have_the_names_of_their_pictures(tmp_path):
    write_pictures(tmp_path / "own", {"a.png": "a", "deep/b.jpg": None}, size=(64, 64))
    (tmp_path / "own/deep/b.txt").write_text("b")
    masks = tmp_path / "masks"
    (masks / "deep").mkdir(parents=True)
    Image.new("L", (32, 32), 255).save(masks / "a.png")
    refused(tmp_path / "own", "no mask for 1 of 2 pictures", "b.jpg", mask=str(masks))
    Image.new("L", (64, 64), 0).save(masks / "deep/b.png")
    Image.new("L", (64, 64), 0).save(masks / "more.png")
    data = read(tmp_path / "own", mask=str(masks))
    assert [float(item.mask_pixels().mean()) for item in data.items] == [1, 0]
    assert note(data, "masks without a picture, not used: more") == 1
    Image.new("L", (64, 32), 0).save(masks / "a.png")
    refused(tmp_path / "own", "a.png: 64x32, but its picture", "64x64", mask=str(masks))
    refused(tmp_path / "own", "there is no folder", mask=str(tmp_path / "nowhere"))


def test_the_opacity_is_a_mask_and_pictures_without_are_counted(tmp_path):
    write_pictures(tmp_path, {"a.png": "a"}, size=(64, 64))
    refused(tmp_path, "no picture has transparent parts", mask="alpha")
    image = scene(64, 64).convert("RGBA")
    image.putalpha(Image.new("L", (64, 64), 0))
    image.save(tmp_path / "b.png")
    data = read(tmp_path, caption="b", mask="alpha")
    assert [item.mask is None for item in data.items] == [True, False]
    assert note(data, "opaque everywhere") == 1


# ------------------------------------------------------------------------------------- held out


def test_all_items_of_a_picture_are_held_out_together_and_the_prior_never(tmp_path):
    write_pictures(tmp_path / "4_own", {f"{number}.png": "a" for number in range(10)})
    write_pictures(tmp_path / "class", {"x.png": "a dog"}, size=(32, 32))
    data = read(tmp_path / "4_own", prior_data=str(tmp_path / "class"))
    train, held_out = held_out_of(data.items, 0.2)
    assert (len(train), len(held_out)) == (8 * 4 + 1, 2)
    assert not {item.content for item in held_out} & {item.content for item in train}
    assert [item.repeat for item in held_out] == [0, 0]
    assert held_out_of(data.items, 0) == (data.items, [])


def test_another_picture_does_not_move_the_others_to_the_other_side(tmp_path):
    names = {f"{number}.png": "a" for number in range(12)}
    write_pictures(tmp_path, names)
    before = {item.content for item in held_out_of(read(tmp_path).items, 0.25)[1]}
    scene(seed=50).save(tmp_path / "00.png")
    after = {item.content for item in held_out_of(read(tmp_path, caption="a").items, 0.25)[1]}
    assert len(before - after) <= 1


def test_one_picture_cannot_be_held_out(tmp_path):
    write_pictures(tmp_path, {"3_a/a.png": "a"})
    with pytest.raises(DataError, match="only one picture"):
        held_out_of(read(tmp_path).items, 0.5)
