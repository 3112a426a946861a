"""The cache of latents and embeddings: never stale, never half written, equal bit for bit to what it was made from."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch
from made_pictures import scene, write_pictures
from torch import nn

from lorakit.data.pictures.cache import TensorCache, caption_key, picture_key, weights_hash
from lorakit.data.pictures.read import read_pictures
from lorakit.data.pictures.settings import PictureSettings
from lorakit.errors import LorakitWarning, NotFiniteError

MAKE_NOTHING = pytest.fail


def item_in(folder, resolution=32, **given):
    return read_pictures(folder, PictureSettings(caption="a", **given), resolution=resolution, multiple=8).items[0]


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 4, 8, stride=8)


def key_of(item, vae) -> str:
    return picture_key(item, item.plain, weights_hash(vae))


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", {"a.png": None}, size=(64, 32))


# ------------------------------------------------------------------------------------- keys


def test_an_edited_pixel_gives_another_key(folder):
    before = key_of(item_in(folder), encoder())
    image = scene(64, 32)
    image.putpixel((40, 20), (1, 2, 3))
    image.save(folder / "a.png")
    assert key_of(item_in(folder), encoder()) != before


def test_another_name_of_the_same_file_has_the_same_key(folder):
    before = key_of(item_in(folder), encoder())
    (folder / "a.png").rename(folder / "b.png")
    assert key_of(item_in(folder), encoder()) == before


def test_size_crop_flip_and_background_are_in_the_key(folder):
    item = item_in(folder, crop="random", flip=True)
    vae = weights_hash(encoder())
    draws = [item.plain, item.drawn(0, 0), item.drawn(0, 1), replace(item.plain, flip=True)]
    keys = {picture_key(item, drawn, vae) for drawn in draws}
    keys.add(key_of(item_in(folder, resolution=16), encoder()))
    keys.add(key_of(item_in(folder, background="black"), encoder()))
    assert len(keys) == 6


def test_a_changed_weight_or_config_of_the_vae_gives_another_key(folder):
    item = item_in(folder)
    vae = encoder()
    before = key_of(item, vae)
    assert key_of(item, encoder()) == before
    with torch.no_grad():
        vae.weight[3, 2, 1, 0] += 2**-12
    assert key_of(item, vae) != before
    changed = encoder()
    changed.config = {"scaling_factor": 0.5}
    of_config = key_of(item, changed)
    changed.config = {"scaling_factor": 0.25}
    assert len({before, of_config, key_of(item, changed)}) == 3
    changed.config = {"scaling_factor": 0.25, "_name_or_path": "elsewhere"}
    assert key_of(item, changed) == key_of(item, changed)


def test_bfloat16_weights_have_a_hash_and_not_that_of_float32():
    assert len(weights_hash(encoder().bfloat16())) == 64
    assert weights_hash(encoder().bfloat16()) != weights_hash(encoder())


def test_where_a_module_came_from_does_not_change_its_hash():
    here, there = encoder(), encoder()
    here.config = {"a": 1, "_name_or_path": "here"}
    there.config = {"a": 1, "_name_or_path": "there"}
    assert weights_hash(here) == weights_hash(there)


def test_caption_text_encoder_and_tokenizer_are_in_a_captions_key():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=300, bos_token_id=0
    )
    model = CLIPTextModel(config)
    first, second = tokenizer(["a", "b"]), tokenizer(["a", "c"])
    keys = {
        caption_key("a dog", weights_hash(model, first)),
        caption_key("a cat", weights_hash(model, first)),
        caption_key("a dog", weights_hash(model, second)),
    }
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    keys.add(caption_key("a dog", weights_hash(model, first)))
    assert len(keys) == 4
    assert weights_hash(first) == weights_hash(tokenizer(["a", "b"]))


def tokenizer(words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)})))


# ------------------------------------------------------------------------------------- files


def test_cached_equals_uncached_bit_for_bit(folder, tmp_path):
    item, vae = item_in(folder), encoder()

    def encode():
        with torch.no_grad():
            return {"latents": vae(item.pixels()[None])[0], "half": torch.tensor([0.1, 2**-24]).bfloat16()}

    cache = TensorCache(tmp_path / "cache")
    fresh = cache.tensors("k" * 64, encode, item.where)
    stored = TensorCache(tmp_path / "cache").tensors("k" * 64, lambda: MAKE_NOTHING("made twice"))
    for name, tensor in encode().items():
        for found in (fresh[name], stored[name]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


@pytest.mark.parametrize("kept", [0, 5, 60, 0.9])
def test_a_truncated_file_is_made_again_with_a_note(tmp_path, kept):
    cache = TensorCache(tmp_path)
    cache.tensors("ab", lambda: {"x": torch.arange(1000.0)})
    path = cache.path("ab")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.warns(LorakitWarning, match=r"ab\.safetensors.*; it is made again"):
        found = cache.tensors("ab", lambda: {"x": torch.arange(1000.0)})
    assert torch.equal(found["x"], torch.arange(1000.0))
    assert path.read_bytes() == data


def test_elements_that_are_not_finite_name_the_picture_and_are_not_stored(folder, tmp_path):
    item = item_in(folder)
    vae = encoder()
    with torch.no_grad():
        vae.weight *= 1e6
    half = vae.half()
    cache = TensorCache(tmp_path / "cache")
    with pytest.raises(NotFiniteError, match=r"pictures/a\.png: its latents have (\d+) elements of \1 that") as caught:
        cache.tensors("ab", lambda: {"latents": half(item.pixels()[None].half())[0]}, item.where)
    assert "float32 or bfloat16" in str(caught.value)
    assert not cache.path("ab").exists()


def _write(folder: str, barrier) -> None:
    cache = TensorCache(folder)
    for key in range(20):
        barrier.wait()  # both write the same file at the same time
        cache.tensors(f"{key:02}key", lambda key=key: {"x": torch.full((2000,), float(key))})


def test_two_processes_may_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_write, args=(str(tmp_path), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = TensorCache(tmp_path)
    for key in range(20):
        found = cache.tensors(f"{key:02}key", lambda: MAKE_NOTHING("not stored"))
        assert torch.equal(found["x"], torch.full((2000,), float(key)))
    assert not list(tmp_path.rglob("*.tmp"))
