"""Captions say what is in the picture, and held-out pairs are never drawn for training."""

from __future__ import annotations

from lorakit.reproduce.emoji.captions import BACKGROUNDS, OBJECTS, pairs, prompt
from lorakit.reproduce.emoji.pictures import scenes


def test_pairs_that_are_held_out_are_never_trained_on():
    held = set(pairs(held=True))
    assert held.isdisjoint(pairs(held=False))
    assert len(held) + len(pairs(held=False)) == 48 * 16
    assert {thing for thing, _ in held} == set(range(48))  # every object has one
    drawn = {
        pair
        for step in range(30)
        for batch in [scenes("denoiser", step, 32)]
        for pair in zip(batch.things.tolist(), batch.backgrounds.tolist(), strict=True)
    }
    assert len(drawn) > 400
    assert held.isdisjoint(drawn)


def test_a_caption_says_what_is_in_the_picture():
    batch = scenes("denoiser", 0, 64)
    names = list(BACKGROUNDS)
    for caption, thing, background in zip(batch.captions, batch.things, batch.backgrounds, strict=True):
        emoji = OBJECTS[thing]
        assert not caption or emoji.word in caption.split() or emoji.kind in caption.split()
        assert not any(words in caption for name, words in BACKGROUNDS.items() if name != names[background])
    assert 0 < batch.captions.count("") < 20
    assert prompt("owl", "orange", "small") == "a small owl on an orange background"
    assert prompt("owl") == "an owl"
