"""How each family takes its latents, found by probing, against the pipelines' own packing."""

from __future__ import annotations

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES, OTHERS

from lorakit.bases.pipeline import as_module
from lorakit.errors import TrainError
from lorakit.tasks.image.packing import layout_of
from lorakit.tasks.image.prompts import batch_prompts, encode_prompts


def found(family):
    return layout_of(as_module(family.pipe), family.latents, family.prompts)


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_is_switched_off(name):
    family = FAMILIES[name]()
    layout = found(family)
    guidance = {n: v for n, v in layout.call.items() if n.endswith("_scale")} | dict.fromkeys(layout.embedded, 1.0)
    assert guidance.items() >= family.guidance.items()
    t = torch.tensor([500, 500, 500])
    probe = as_module(family.pipe).probe(layout.argument(family.latents), t, **family.prompts, **layout.call)
    assert probe.rows == 3


def test_models_that_are_given_their_guidance():
    embedded = {name: found(make()).embedded for name, make in FAMILIES.items()}
    assert {name for name, names in embedded.items() if names} == {"flux", "flux2"}
    assert embedded["flux"] == ("guidance_scale",)


def test_a_consistency_model_is_given_its_guidance():
    family = FAMILIES["sd1"]()
    family.pipe.unet.register_to_config(time_cond_proj_dim=16)
    assert found(family).embedded == ("guidance_scale",)


def test_rows_share_a_timestep_only_where_they_must():
    assert {name for name, make in {**FAMILIES, **OTHERS}.items() if not found(make()).together} == {"aura_flow"}


def test_a_distilled_qwen_image_is_given_its_guidance():
    family = FAMILIES["qwen_image"]()
    family.pipe.transformer.register_to_config(guidance_embeds=True)
    assert found(family).embedded == ("guidance_scale",)


@pytest.mark.parametrize("name", ["flux", "chroma", "qwen_image"])
def test_packing_is_the_pipelines_own(name):
    family = FAMILIES[name]()
    latents = family.latents
    theirs = type(family.pipe)._pack_latents(latents, 3, 4, 8, 8)
    layout = found(family)
    assert torch.equal(layout.packed(latents), theirs)
    assert torch.equal(layout.argument(latents), theirs)
    assert torch.equal(layout.unpacked(theirs), latents)


def test_flux2_packs_itself():
    family = FAMILIES["flux2"]()
    layout = found(family)
    assert torch.equal(layout.argument(family.latents), family.latents)
    assert torch.equal(layout.packed(family.latents), type(family.pipe)._pack_latents(family.latents))
    assert torch.equal(layout.unpacked(layout.packed(family.latents)), family.latents)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "z_image", "wan"])
def test_others_are_not_packed(name):
    family = FAMILIES[name]()
    layout = found(family)
    assert layout.packed(family.latents) is not None
    assert torch.equal(layout.packed(family.latents), family.latents)
    assert layout.order is None


def test_packing_needs_no_exact_numbers():
    """In bfloat16, to which Flux casts its latents, whole numbers above 256 are not exact."""
    family = FAMILIES["flux"]()
    family.pipe.to(torch.bfloat16)
    prompts = {name: value.bfloat16() for name, value in family.prompts.items()}
    latents = torch.randn(3, 4, 16, 16)
    layout = layout_of(as_module(family.pipe), latents, prompts)
    assert torch.equal(layout.packed(latents), type(family.pipe)._pack_latents(latents, 3, 4, 16, 16))


def test_latents_are_cast_only_where_the_pipeline_does_not():
    sd, z = FAMILIES["sd1"](), FAMILIES["z_image"]()
    for family in (sd, z):
        family.pipe.to(torch.bfloat16)
    prompts = {"prompt_embeds": sd.prompts["prompt_embeds"].bfloat16()}
    assert layout_of(as_module(sd.pipe), sd.latents, prompts).dtype == torch.bfloat16
    prompts = {"prompt_embeds": [row.bfloat16() for row in z.prompts["prompt_embeds"]]}
    assert layout_of(as_module(z.pipe), z.latents, prompts).dtype is None


def test_the_shift_is_what_the_pipeline_computes():
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    assert found(FAMILIES["flux"]()).mu == pytest.approx(calculate_shift(16, max_shift=1.15))
    assert found(FAMILIES["flux2"]()).mu == pytest.approx(compute_empirical_mu(16, 50))
    assert found(FAMILIES["sd1"]()).mu is None


def test_one_probe_a_size():
    family = FAMILIES["sd1"]()
    assert found(family) is found(family)
    assert found(family).call["height"] == 16
    larger = layout_of(as_module(family.pipe), torch.zeros(1, 4, 8, 16), family.prompts)
    assert (larger.call["height"], larger.call["width"]) == (16, 32)


def test_another_scheduler_or_precision_is_probed_anew():
    family = FAMILIES["flux"]()
    first = found(family)
    family.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(family.pipe.scheduler.config)
    assert found(family) is not first
    sd = FAMILIES["sd1"]()
    assert found(sd).dtype is None
    sd.pipe.to(torch.bfloat16)
    prompts = {"prompt_embeds": sd.prompts["prompt_embeds"].bfloat16()}
    assert layout_of(as_module(sd.pipe), sd.latents, prompts).dtype == torch.bfloat16


def test_latents_in_another_memory_format():
    family = FAMILIES["flux"]()
    latents = family.latents.contiguous(memory_format=torch.channels_last)
    layout = found(family)
    assert torch.equal(layout.argument(latents), layout.argument(family.latents))
    assert torch.equal(layout.packed(latents), layout.packed(family.latents))


def test_packed_without_prompts():
    family = FAMILIES["flux"]()
    theirs = type(family.pipe)._pack_latents(family.latents, 3, 4, 8, 8)
    prompts = batch_prompts(encode_prompts(family.pipe, [""]))
    assert torch.equal(layout_of(as_module(family.pipe), family.latents, prompts).packed(family.latents), theirs)


# ------------------------------------------------------------------------------------- refused


def test_a_size_that_cannot_be_divided_is_refused():
    family = FAMILIES["flux"]()
    with pytest.raises(TrainError, match=r"(?s)FluxPipeline cannot be trained this way.*\[4, 7, 8\].*into patches"):
        layout_of(as_module(family.pipe), torch.zeros(1, 4, 7, 8), family.prompts)


def test_what_the_pipeline_says_of_missing_prompts_is_passed_on():
    family = FAMILIES["flux"]()
    with pytest.raises(TrainError, match=r"(?s)FluxPipeline cannot be trained.*pooled_prompt_embeds.*prompt_embeds"):
        layout_of(as_module(family.pipe), family.latents, {"prompt_embeds": family.prompts["prompt_embeds"]})


def test_guidance_that_cannot_be_switched_off_is_refused():
    class AlwaysGuided(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt_embeds=None, latents=None):
            latents = torch.zeros(2, 4, 8, 8) if latents is None else latents
            twice = torch.cat([latents, latents])
            out = self.unet(twice, 1, encoder_hidden_states=torch.cat([prompt_embeds] * 2))[0]
            self.scheduler.step(out[: len(latents)], 1, latents)

    pipe = AlwaysGuided(**tiny.tiny_sd1().components, requires_safety_checker=False)
    family = FAMILIES["sd1"]()
    with pytest.raises(TrainError, match="4 rows for 2, and no guidance_scale switches that off"):
        layout_of(as_module(pipe), family.latents, family.prompts)
