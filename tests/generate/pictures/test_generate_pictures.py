"""Pictures of a pipeline: equal to its own call's, whatever batch they are in, with adapters by picture."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny_pipelines
import torch
from adapted_pipelines import with_adapters

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.errors import ConfigError, LorakitWarning, NotFiniteError, StateError
from lorakit.generate.pictures import generate as module
from lorakit.generate.pictures.call import cut_prompts
from lorakit.generate.pictures.generate import generate_pictures, stream_pictures
from lorakit.model.activate import activate, active
from lorakit.model.route import route

PROMPTS = ["a red cat", "a dog in the style of sks", "an animal", "a red dog on the cat"]
SHORT = {"steps": 2, "guidance": 3.0}


def arrays(pictures):
    return [np.asarray(picture).astype(int) for picture in pictures]


def furthest(one, other):
    """The largest difference between two lists of pictures, in 1 of 255."""
    return max(int(np.abs(a - b).max()) for a, b in zip(arrays(one), arrays(other), strict=True))


def direct(pipe, prompt, seed, **call):
    """The picture of diffusers' own call."""
    call = {"num_inference_steps": 2, "guidance_scale": 3.0} | call
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]


@pytest.mark.parametrize("make", [tiny_pipelines.tiny_sd1, tiny_pipelines.tiny_sdxl])
def test_pictures_are_those_of_the_pipelines_own_call(make):
    pipe = make()
    ours = generate_pictures(pipe, PROMPTS[:2], seed=[4, 5], batch_size=1, negative="the dog", **SHORT)
    theirs = [direct(pipe, p, s, negative_prompt="the dog") for p, s in zip(PROMPTS, (4, 5))]
    assert furthest(ours, theirs) == 0
    assert furthest(ours[:1], ours[1:]) > 0


def test_a_picture_does_not_depend_on_its_batch(sd1):
    alone = generate_pictures(sd1, PROMPTS, seed=[1, 2, 3, 4], batch_size=1, **SHORT)
    for size in (2, 3, 4):
        assert furthest(generate_pictures(sd1, PROMPTS, seed=[1, 2, 3, 4], batch_size=size, **SHORT), alone) <= 1
    turned = generate_pictures(sd1, PROMPTS[::-1], seed=[4, 3, 2, 1], **SHORT)[::-1]
    assert furthest(turned, alone) <= 1


@pytest.mark.parametrize("make", [tiny_pipelines.tiny_sd1, tiny_pipelines.tiny_sdxl])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_adapters_of_one_pass_are_those_of_each_picture(make, guidance, monkeypatch):
    pipe = with_adapters(make())
    weights = [None, "ink", {"neon": 0.7}, {"ink": 0.7, "neon": -0.4}]
    alone = []
    for prompt, which in zip(PROMPTS, weights):
        activate(as_module(pipe), which)
        alone.append(direct(pipe, prompt, 7, guidance_scale=guidance))
    activate(as_module(pipe), "ink")
    calls = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *args: calls.append(len(args[1])) or run(*args))
    mixed = generate_pictures(pipe, PROMPTS, seed=7, weights=weights, steps=2, guidance=guidance)
    assert calls == [4], "all in one pass"
    assert furthest(mixed, alone) <= 1
    assert all(furthest([a], [b]) > 1 for a, b in pairwise(alone))
    assert active(as_module(pipe)) == {"ink": 1.0}, "the active adapters are as before"


def test_a_pipeline_that_interleaves_its_rows_is_run_one_by_one(adapted, monkeypatch):
    weights = [None, "ink", "neon"]
    expected = generate_pictures(adapted, PROMPTS[:3], seed=7, weights=weights, batch_size=1, **SHORT)

    def beside_each_other(_, args):
        latents = args[0]
        rows = latents.view(2, -1, *latents.shape[1:]).transpose(0, 1).flatten(0, 1)
        return (rows, *args[1:]) if len(latents) > 2 else None

    # As a pipeline would that puts each picture's two rows beside each other.
    hook = adapted.unet.register_forward_pre_hook(beside_each_other)
    calls = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *args: calls.append(len(args[1])) or run(*args))
    got = generate_pictures(adapted, PROMPTS[:3], seed=7, weights=weights, **SHORT)
    hook.remove()
    assert calls == [3, 1, 1, 1]
    assert furthest(got, expected) <= 1


def test_scale_multiplies_the_weights_and_zero_is_the_base(adapted):
    activate(as_module(adapted), {"ink": 0.8})
    scaled = generate_pictures(adapted, ["a red cat"] * 3, seed=7, scale=[0, 0.5, 1], **SHORT)
    given = generate_pictures(adapted, ["a red cat"] * 3, seed=7, weights=[None, {"ink": 0.4}, {"ink": 0.8}], **SHORT)
    assert furthest(scaled, given) == 0
    activate(as_module(adapted), None)
    assert furthest(generate_pictures(adapted, ["a red cat"], seed=7, **SHORT), scaled[:1]) == 0


def test_merged_pictures_are_the_same_and_the_weights_are_given_back(adapted):
    weights = [None, "ink", "ink", {"ink": 0.5, "neon": 0.5}]
    before = {n: p.clone() for n, p in as_module(adapted).named_parameters()}
    live = generate_pictures(adapted, PROMPTS, seed=7, weights=weights, **SHORT)
    merged = generate_pictures(adapted, PROMPTS, seed=7, weights=weights, merged=True, **SHORT)
    assert furthest(live, merged) <= 1
    assert all(torch.equal(p, before[n]) for n, p in as_module(adapted).named_parameters())


def test_afterwards_the_pipeline_is_as_it_was(sd1):
    sd1.unet.train()
    bar = dict(sd1._progress_bar_config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    generate_pictures(sd1, ["a red cat"], **SHORT)
    assert sd1.unet.training
    assert not sd1.vae.training
    assert sd1._progress_bar_config == bar
    assert torch.equal(torch.get_rng_state(), state), "the noise is of its own generators"


def test_pictures_come_as_they_are_made(sd1):
    stream = stream_pictures(sd1, PROMPTS, batch_size=1, **SHORT)
    assert next(stream).size == (16, 16)
    stream.close()


def test_a_cut_prompt_is_said(sd1):
    long = "a cat on the red dog in the style of sks animal of the cat"
    with pytest.warns(LorakitWarning, match="text_encoder: .* has no effect") as said:
        generate_pictures(sd1, [long], **SHORT)
    assert "the cat" in str(said[0].message)
    assert "first 16 are read" in str(said[0].message)


def test_a_negative_prompt_without_effect_is_said(sd1):
    with pytest.warns(LorakitWarning, match="negative prompt has no effect"):
        generate_pictures(sd1, ["a cat"], negative="a dog", steps=1, guidance=1.0)


def test_nan_is_an_error_that_names_the_picture(sd1):
    with torch.no_grad():
        sd1.vae.decoder.conv_out.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"'a cat' \(seed 3\)"):
        generate_pictures(sd1, ["a cat"], seed=3, **SHORT)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"width": 15}, "width is 15.* multiples of 8 .*\n.*nearest: 8 or 16"),
        ({"height": -2}, "height is -2"),
        ({"seed": [1]}, "seed has 1 values for 2 prompts"),
        ({"seed": -1}, "seed is -1"),
        ({"weights": ["a"] * 3}, "weights has 3 values"),
        ({"scale": [1.0]}, "scale has 1 values"),
        ({"guidance_rescal": 1}, "did you mean 'guidance_rescale'"),
        ({"latents": 1}, "'latents' is not set as a further argument"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"guidance_scale": 3.0}, "'guidance_scale' is not set as a further argument"),
    ],
)
def test_settings_out_of_range_are_named(sd1, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate_pictures(sd1, ["a cat", "a dog"], **settings)


def test_an_unknown_adapter_is_an_error(adapted, sd1):
    with pytest.raises(StateError, match="no adapter named 'inc'"):
        generate_pictures(adapted, ["a", "a"], weights=["inc", None], **SHORT)
    with pytest.raises(StateError, match="no adapter is attached"):
        generate_pictures(sd1, ["a"], weights=["ink"], **SHORT)


def test_one_text_for_a_list_of_prompts_is_refused(sd1):
    with pytest.raises(ConfigError, match="expected a list of prompts"):
        generate_pictures(sd1, "a cat")


def test_a_route_around_the_call_is_refused(adapted):
    with route(as_module(adapted), ["ink"]), pytest.raises(StateError, match="route"):
        generate_pictures(adapted, ["a", "b"], weights=["ink", None], **SHORT)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_pictures_are_those_of_diffusers_with_our_files(adapted, format, tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("ink", "neon")}
    for name, file in files.items():
        lk.capture(adapted, name).save(file, format=format)
    weights = {"ink": 0.7, "neon": 0.7}
    ours = generate_pictures(adapted, PROMPTS, seed=7, weights=[None, "ink", "neon", weights], **SHORT)
    theirs = tiny_pipelines.tiny_sd1()
    pictures = [direct(theirs, PROMPTS[0], 7)]
    for name, file in files.items():
        theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    for prompt, which in zip(PROMPTS[1:], ({"ink": 1.0}, {"neon": 1.0}, weights)):
        theirs.set_adapters(list(which), list(which.values()))
        pictures.append(direct(theirs, prompt, 7))
    assert furthest(ours, pictures) <= 1


def test_a_tokenizer_that_does_not_say_how_much_is_read_cuts_nothing():
    pipe = tiny_pipelines.tiny_sd1()
    assert cut_prompts(pipe, ["a cat " * 20])
    pipe.tokenizer.model_max_length = None
    assert cut_prompts(pipe, ["a cat " * 20]) == []
