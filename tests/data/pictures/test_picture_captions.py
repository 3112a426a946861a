"""The trigger word, and tags that are shuffled."""

from __future__ import annotations

from random import Random

import pytest

from lorakit.data.pictures.captions import shuffled, with_trigger


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a dog on grass", "sks, a dog on grass"),
        ("a photo of [trigger] dog", "a photo of sks dog"),
        ("a sks dog", "a sks dog"),
        ("a Sks dog", "a Sks dog"),
        ("asks for food", "sks, asks for food"),  # a part of another word is not the trigger
        ("", "sks"),
    ],
)
def test_the_trigger_word_is_in_every_caption_once(caption, expected):
    assert with_trigger(caption, "sks") == expected


def test_without_a_trigger_word_captions_are_unchanged():
    assert with_trigger("a [trigger] dog", None) == "a [trigger] dog"


def test_shuffled_tags_are_the_same_tags_and_the_first_ones_stay():
    tags = "sks, cat, grass, sun, tree, sky, house"
    results = {shuffled(tags, 1, "sks", Random(seed)) for seed in range(20)}
    assert len(results) > 10
    for result in results:
        assert sorted(result.split(", ")) == sorted(tags.split(", "))
        assert result.startswith("sks, cat, ")  # the trigger word stays, and one more


def test_keep_counts_from_the_start_where_there_is_no_trigger_word():
    assert shuffled("a,b , c,", 2, None, Random(0)) == "a, b, c"
    assert shuffled("", 2, "sks", Random(0)) == ""
