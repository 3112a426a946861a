"""Pictures to latents by the autoencoder's config, against what the pipelines do when they decode."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES

from lorakit.bases.pipeline import as_module
from lorakit.errors import DataError, TrainError
from lorakit.tasks.image.latents import decode_latents, encode_pictures, latent_scale, size_multiple
from lorakit.tasks.image.packing import layout_of

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_what_the_pipeline_does(name):
    """The pipeline, given our latents as its last step's, decodes them to our pixels."""
    family = FAMILIES[name]()
    pipe, latents = family.pipe, family.latents
    model = as_module(pipe)
    layout = layout_of(model, latents, family.prompts)

    class Stopped(type(pipe.scheduler)):
        """A scheduler whose only step leads to our latents."""

        def step(self, output, t, sample, *args, **kwargs):
            return (layout.packed(latents),)

    pipe.scheduler = Stopped.from_config(pipe.scheduler.config)
    vars(pipe)["_progress_bar_config"] = {"disable": True}
    call = {**family.prompts, **layout.call, **dict.fromkeys(layout.embedded, 1.0)}
    pictures = pipe(**call, num_inference_steps=1, output_type="pt")
    theirs = getattr(pictures, "images", None)
    theirs = pictures.frames[:, 0] if theirs is None else theirs
    ours = decode_latents(pipe, latents) / 2 + 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoding_undoes_decodings_normalisation(name):
    family = FAMILIES[name]()
    pipe = family.pipe
    latents = encode_pictures(pipe, PIXELS)
    assert latents.shape[1:] == family.latents.shape[1:]
    assert latents.dtype == torch.float32
    with torch.no_grad():
        x = PIXELS[:, :, None] if latents.dim() == 5 else PIXELS
        expected = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    expected = expected[:, :, 0] if expected.dim() == 5 else expected
    torch.testing.assert_close(decode_latents(pipe, latents), expected.clamp(-1, 1), atol=1e-4, rtol=0)


def test_twice_the_same_bits():
    pipe = tiny.tiny_sd1()
    assert torch.equal(encode_pictures(pipe, PIXELS), encode_pictures(pipe, PIXELS))


def test_latents_that_are_not_finite_name_the_picture():
    pipe = tiny.tiny_sd1()
    bad = PIXELS.clone()
    bad[1, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match=r"dog\.png: the autoencoder's latents are not finite.*float32\n.*leave"):
        encode_pictures(pipe, bad, ["cat.png", "dog.png"])
    with torch.no_grad():
        pipe.vae.half().quant_conv.weight.mul_(1e6)
    with pytest.raises(DataError, match=r"cat\.png: .* it computes in float16\n  load the autoencoder in float32"):
        encode_pictures(pipe, PIXELS, ["cat.png", "dog.png"])


def test_sizes():
    multiples = {name: (latent_scale(make().pipe), size_multiple(make().pipe)) for name, make in FAMILIES.items()}
    assert multiples["sd1"] == (2, 2)
    assert multiples["flux"] == (2, 4)
    assert multiples["flux2"] == (4, 4)
    assert multiples["wan"] == (2, 4)
    assert {scale for name, (scale, _) in multiples.items() if name != "flux2"} == {2}


def test_a_pipeline_without_an_autoencoder_is_refused():
    pipe = tiny.tiny_sd1()
    vars(pipe)["vae"] = None
    with pytest.raises(TrainError, match="no autoencoder"):
        encode_pictures(pipe, PIXELS)
