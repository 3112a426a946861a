"""The embedded image model's tokens and latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_diffusion.latents import CHANNELS, fit
from tiny_diffusion.tokenizer import LENGTH, make_tokenizer
from transformers import CLIPTokenizer

from lorakit.reproduce.emoji.captions import all_words
from lorakit.reproduce.emoji.pictures import scenes
from lorakit.reproduce.emoji.styles import some_styled


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
