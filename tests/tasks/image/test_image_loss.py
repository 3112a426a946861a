"""The loss of a batch, against the same written out with diffusers' scheduler and the bare denoiser."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.errors import ConfigError
from lorakit.tasks.image.loss import fixed_losses, losses, trained_timesteps
from lorakit.tasks.image.settings import DiffusionSettings
from lorakit.tasks.image.timesteps import sample_timesteps


def loss_of(family, settings=None, mask=None, seed=0):
    torch.manual_seed(seed)
    return losses(as_module(family.pipe), family.latents, family.prompts, settings or DiffusionSettings(), mask)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_by_hand(kind):
    family = FAMILIES["sd1"]()
    family.pipe.scheduler = tiny.scheduler(prediction_type=kind)
    import diffusers

    theirs = diffusers.DDPMScheduler.from_config(family.pipe.scheduler.config)
    torch.manual_seed(0)
    t = sample_timesteps(family.pipe.scheduler, 3, None, DiffusionSettings())
    noise = torch.randn(family.latents.shape)
    x = family.latents
    with torch.no_grad():
        out = family.pipe.unet(theirs.add_noise(x, noise, t), t, family.prompts["prompt_embeds"]).sample
        target = {"epsilon": noise, "sample": x, "v_prediction": theirs.get_velocity(x, noise, t)}[kind]
        ours = loss_of(family)
    torch.testing.assert_close(ours, (out - target).square().mean((1, 2, 3)), atol=1e-5, rtol=0)


def test_flow_matching_by_hand():
    """Flux's packed layout, with its transformer called as diffusers' training script does."""
    family = FAMILIES["flux"]()
    torch.manual_seed(0)
    t = sample_timesteps(family.pipe.scheduler, 3, None, DiffusionSettings(), mu=0.459375)
    noise, x = torch.randn(family.latents.shape), family.latents
    s = (t / 1000).view(3, 1, 1, 1)
    pack = type(family.pipe)._pack_latents
    ids = type(family.pipe)._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32)
    with torch.no_grad():
        out = family.pipe.transformer(
            hidden_states=pack((1 - s) * x + s * noise, 3, 4, 8, 8),
            timestep=t / 1000,
            guidance=torch.full((3,), 3.5),
            pooled_projections=family.prompts["pooled_prompt_embeds"],
            encoder_hidden_states=family.prompts["prompt_embeds"],
            txt_ids=torch.zeros(5, 3),
            img_ids=ids,
        ).sample
        ours = loss_of(family, DiffusionSettings(guidance=3.5))
    expected = (out - pack(noise - x, 3, 4, 8, 8)).square().mean((1, 2))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_seed_is_a_loss():
    family = FAMILIES["sd1"]()
    assert torch.equal(loss_of(family), loss_of(family))
    assert not torch.equal(loss_of(family), loss_of(family, seed=1))


def test_a_model_wrapped_for_several_processes_is_called_itself():
    family = FAMILIES["sd1"]()
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            calls.append(kwargs)
            return self.module(*args, **kwargs)

    torch.manual_seed(0)
    wrapped = losses(Wrapper(as_module(family.pipe)), family.latents, family.prompts, DiffusionSettings())
    assert torch.equal(wrapped, loss_of(family))
    assert len(calls) == 1


def test_min_snr_weighs_the_rows():
    family = FAMILIES["sd1"]()
    torch.manual_seed(0)
    t = sample_timesteps(family.pipe.scheduler, 3, None, DiffusionSettings())
    alpha = family.pipe.scheduler.alphas_cumprod.double()[t]
    snr = alpha / (1 - alpha)
    expected = loss_of(family).double() * snr.clamp(max=1.0) / snr
    torch.testing.assert_close(loss_of(family, DiffusionSettings(min_snr=1.0)).double(), expected, atol=1e-6, rtol=0)


def test_min_snr_is_refused_for_flow_matching():
    with pytest.raises(ConfigError, match="flow matching"):
        loss_of(FAMILIES["sd3"](), DiffusionSettings(min_snr=5.0))
    with pytest.raises(ConfigError, match="min_snr"):
        DiffusionSettings(min_snr=0)


def test_the_offset_is_the_same_all_over_a_channel():
    from lorakit.tasks.image.loss import offset_noise

    torch.manual_seed(0)
    noise = offset_noise(torch.zeros(500, 4, 1, 16, 16), 0.5)
    assert noise.mean((2, 3, 4)).std() == pytest.approx((0.25 + 1 / 256) ** 0.5, rel=0.05)
    assert (noise - noise.mean((2, 3, 4), keepdim=True)).std() == pytest.approx(1, rel=0.02)


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["sd1", "flux", "wan"])
def test_what_is_masked_has_no_effect(name):
    family = FAMILIES[name]()
    mask = torch.ones(3, 1, 16, 16)
    mask[..., 8:] = 0
    model = as_module(family.pipe)
    whole = loss_of(family, mask=torch.ones(3, 1, 16, 16))
    torch.testing.assert_close(whole, loss_of(family))
    # The loss is the mean over the left half alone: both halves together are the whole.
    left, right = loss_of(family, mask=mask), loss_of(family, mask=1 - mask)
    torch.testing.assert_close((left + right) / 2, whole)
    assert not torch.allclose(left, whole)
    assert model is as_module(family.pipe)


def test_an_empty_mask_has_no_loss():
    assert torch.equal(loss_of(FAMILIES["sd1"](), mask=torch.zeros(3, 1, 16, 16)), torch.zeros(3))


# ------------------------------------------------------------------------------------- fixed noise


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_fixed_losses_are_the_same_bits(name):
    family = FAMILIES[name]()
    model = as_module(family.pipe)
    torch.manual_seed(1)
    once = fixed_losses(model, family.latents, family.prompts, DiffusionSettings(), seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = fixed_losses(model, family.latents, family.prompts, DiffusionSettings(), seed=3)
    assert once.shape == (3, 4)
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(once, fixed_losses(model, family.latents, family.prompts, DiffusionSettings(), seed=4))
    one = {k: v[1:2] for k, v in family.prompts.items()}
    alone = fixed_losses(model, family.latents[1:2], one, DiffusionSettings(), seed=[4])
    torch.testing.assert_close(alone[0], once[1], atol=1e-5, rtol=0)


def test_a_fresh_adapter_has_the_bases_loss():
    family = FAMILIES["sd1"]()
    model = as_module(family.pipe)
    base = fixed_losses(model, family.latents, family.prompts, DiffusionSettings())
    lk.attach(family.pipe, lk.LoraConfig(rank=2, targets=["to_q"]))
    assert torch.equal(fixed_losses(model, family.latents, family.prompts, DiffusionSettings()), base)


# ------------------------------------------------------------------------------------- two experts


@pytest.mark.parametrize(
    ("expert", "low", "high", "outside"),
    [("transformer", 600, 1000, {"max_timestep": 500}), ("transformer_2", 0, 600, {"min_timestep": 700})],
)
def test_timesteps_are_those_of_the_expert_that_is_trained(expert, low, high, outside):
    import diffusers

    family = FAMILIES["wan"]()
    second = diffusers.WanTransformer3DModel.from_config(family.pipe.transformer.config).eval()
    vars(family.pipe)["transformer_2"] = second
    family.pipe.register_to_config(boundary_ratio=0.6)
    model, settings = as_module(family.pipe), DiffusionSettings()
    assert trained_timesteps(model, settings) == settings
    lk.attach(family.pipe, lk.LoraConfig(rank=2, targets=["to_q"], components=[expert]))
    own = trained_timesteps(model, settings)
    assert (own.min_timestep, own.max_timestep) == (low, high)
    with pytest.raises(ConfigError, match=rf"{expert} predicts timesteps .* 600, and none of them is between"):
        trained_timesteps(model, DiffusionSettings(**outside))
    losses(model, family.latents, family.prompts, settings).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
