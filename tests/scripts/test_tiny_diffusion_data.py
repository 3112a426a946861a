"""The embedded image model's pictures, captions, tokens and latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_diffusion.captions import BACKGROUNDS, OBJECTS, all_words, emoji_list, pairs, prompt
from tiny_diffusion.latents import CHANNELS, fit
from tiny_diffusion.pictures import scenes, sprites
from tiny_diffusion.styles import STYLES, some_styled
from tiny_diffusion.tokenizer import LENGTH, make_tokenizer
from transformers import CLIPTokenizer


def test_the_sheet_holds_every_emoji_of_the_list():
    assert len(OBJECTS) == 48
    assert len(sprites()) == len(emoji_list()) == len({emoji.word for emoji in emoji_list()}) == 72
    for sprite in sprites():
        assert all(0.1 < pixels[..., 3].mean() < 1 for pixels in sprite.values())


def test_a_batch_depends_on_its_step_and_purpose_alone():
    first, again = scenes("denoiser", 3, 4), scenes("denoiser", 3, 4)
    assert torch.equal(first.pictures, again.pictures)
    assert first.captions == again.captions
    for other in (scenes("denoiser", 4, 4), scenes("judge", 3, 4)):
        assert not torch.equal(first.pictures, other.pictures)


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


def test_every_caption_word_is_one_token_and_the_files_are_clips(tmp_path):
    tokenizer = make_tokenizer()
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()  # the denoiser is trained on these very numbers
    assert all(len(tokenizer(word).input_ids) == 3 for word in all_words())
    tokenizer.save_pretrained(tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a small panda in a meadow, sks style é 😀"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert len(read("a panda", padding="max_length").input_ids) == LENGTH == read.model_max_length
    assert read.decode(read("a Panda, sks", add_special_tokens=False).input_ids).replace(" ,", ",") == "a panda, sks"


def test_the_projection_is_the_best_of_its_rank_and_latents_survive_it():
    pictures = some_styled(scenes("projection", 0, 256, unseen=True).pictures)
    projection = fit(pictures)
    latents = projection.encode(pictures)
    assert latents.shape == (256, CHANNELS, 8, 8)
    assert latents.var().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(projection.encode(projection.decode(latents)), latents, atol=1e-4, rtol=0)
    # numpy's singular value decomposition of the same patches loses as much
    patches = pictures.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double().numpy()
    values = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    lost = (projection.decode(latents) - pictures).double().square().sum().item()
    assert lost == pytest.approx((values[CHANNELS:] ** 2).sum(), rel=1e-3)


@pytest.mark.parametrize("name", STYLES)
def test_styles_keep_shape_and_range_and_change_the_picture(name):
    pictures = scenes("validation", 0, 4).pictures
    styled = STYLES[name](pictures)
    assert styled.shape == pictures.shape
    assert styled.amin() >= -1
    assert styled.amax() <= 1
    assert (styled - pictures).abs().mean() > 0.1
