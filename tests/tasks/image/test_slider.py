"""A slider's objective by hand, where its gradients go, and that a trained one moves both ways."""

from __future__ import annotations

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.errors import ConfigError
from lorakit.model.activate import active
from lorakit.tasks.image import slider
from lorakit.tasks.image.loss import predict
from lorakit.tasks.image.objective import Objective
from lorakit.tasks.image.packing import layout_of
from lorakit.tasks.image.prompts import batch_prompts, encode_prompts
from lorakit.tasks.image.settings import DiffusionSettings
from lorakit.tasks.image.slider import SliderPrompts, SliderSettings, denoised, slider_losses, slider_prompts
from lorakit.tasks.image.timesteps import sample_timesteps

SLIDER = SliderSettings(positive="a red cat", negative="a dog", target="animal", strength=2.0, denoise_steps=2)
SHAPE = (4, 8, 8)


@pytest.fixture
def pipe():
    pipe = tiny.tiny_sd1()
    lk.attach(pipe, lk.LoraConfig(rank=4, alpha=4, targets="attention"))
    return pipe


def predicted(pipe, caption, x, t):
    prompts = batch_prompts(encode_prompts(pipe, [caption] * len(x)))
    model = as_module(pipe)
    with torch.no_grad():
        return predict(model, layout_of(model, x, prompts), x, t, prompts)


def loss_of(pipe, rows=2, slider=SLIDER, seed=0):
    torch.manual_seed(seed)
    return slider_losses(as_module(pipe), SHAPE, slider_prompts(pipe, slider), slider, DiffusionSettings(), rows)


def test_a_fresh_adapter_is_off_by_the_property(pipe):
    """Without an effect it misses the target by η times the difference of the base's predictions, both ways."""
    model, objective = as_module(pipe), Objective.of(pipe.scheduler)
    ours = loss_of(pipe).detach()
    torch.manual_seed(0)
    torch.randint(1, (2,))
    noise = torch.randn(2, *SHAPE)
    order = torch.randperm(2)
    t = ((order + torch.rand(2, dtype=torch.float64)) / 2 * 1000).long()
    prompts = batch_prompts(encode_prompts(pipe, ["animal"] * 2))
    layout = layout_of(model, noise, prompts)
    x = denoised(noise, t, 2, objective, layout, lambda x, s: predicted(pipe, "animal", x, s))
    difference = predicted(pipe, "a red cat", x, t) - predicted(pipe, "a dog", x, t)
    torch.testing.assert_close(ours, (2.0 * difference).square().mean((1, 2, 3)), atol=1e-6, rtol=1e-4)
    assert (ours > 0).all()


def test_gradients_reach_the_adapter_and_nothing_else_changes(pipe):
    before = active(pipe)
    loss_of(pipe).sum().backward()
    reached = [n for n, p in as_module(pipe).named_parameters() if p.requires_grad and p.grad.abs().sum() > 0]
    assert len(reached) == len([n for n, _ in as_module(pipe).named_parameters() if n.endswith("lora_default.B")])
    assert active(pipe) == before
    assert torch.equal(loss_of(pipe), loss_of(pipe))


def test_a_trained_slider_moves_both_ways(pipe):
    """At scale 1 towards the positive prompt, at -1 away from it, for latents and timesteps it has not seen."""
    parameters = [p for p in as_module(pipe).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0)
    losses = []
    for step in range(30):
        loss = loss_of(pipe, 4, seed=step).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(99))
    t = torch.linspace(50, 950, 8).long()
    lk.activate(pipe, None)
    direction = predicted(pipe, "a red cat", x, t) - predicted(pipe, "a dog", x, t)
    base = predicted(pipe, "animal", x, t)
    cosines = []
    for scale in (-1.0, 1.0, 2.0):
        lk.activate(pipe, {"default": scale})
        moved = predicted(pipe, "animal", x, t) - base
        cosines.append(torch.cosine_similarity(moved.flatten(), direction.flatten(), dim=0).item())
    assert cosines[0] < -0.4
    assert cosines[1] > 0.4
    assert cosines[2] > 0.4


@pytest.mark.parametrize("name", ["flux", "z_image", "wan"])
def test_denoising_leads_to_each_rows_timestep(name):
    """With the true noise predicted, the steps end at the mix of latents and noise of that timestep."""
    family = FAMILIES[name]()
    layout = layout_of(as_module(family.pipe), family.latents, family.prompts)
    objective = Objective.of(family.pipe.scheduler)
    t, noise = torch.tensor([100.0, 500.0, 900.0]), torch.randn(family.latents.shape)
    x = denoised(noise, t, 4, objective, layout, lambda x, s: layout.packed(noise - family.latents))
    torch.testing.assert_close(x, objective.noised(family.latents, noise, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("expert", "trained"), [("transformer", range(600, 1001)), ("transformer_2", range(601))])
def test_a_slider_of_one_expert_is_trained_on_its_timesteps(monkeypatch, expert, trained):
    """Wan 2.2's two experts each predict a part of the timesteps."""
    family = FAMILIES["wan"]()
    second = diffusers.WanTransformer3DModel.from_config(family.pipe.transformer.config).eval()
    vars(family.pipe)["transformer_2"] = second
    family.pipe.register_to_config(boundary_ratio=0.6)
    lk.attach(family.pipe, lk.LoraConfig(rank=2, targets=["to_q"], components=[expert]))
    model, drawn = as_module(family.pipe), []

    def sampled(*arguments):
        drawn.append(sample_timesteps(*arguments))
        return drawn[-1]

    monkeypatch.setattr(slider, "sample_timesteps", sampled)
    rows = [[{name: value[row] for name, value in family.prompts.items()}] for row in range(3)]
    shape, prompts = family.latents.shape[1:], SliderPrompts(*rows)
    slider_losses(model, shape, prompts, SLIDER.replace(denoise_steps=1), DiffusionSettings(), 3).sum().backward()
    assert all(trained[0] <= t <= trained[-1] for t in drawn[0].tolist())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_preserved_words_are_put_before_all_prompts(pipe):
    prompts = slider_prompts(pipe, SLIDER.replace(preserve=["cat", "dog"], target=""))
    expected = encode_prompts(pipe, ["cat a red cat", "dog a dog", "cat"])
    assert torch.equal(prompts.positive[0]["prompt_embeds"], expected[0]["prompt_embeds"])
    assert torch.equal(prompts.negative[1]["prompt_embeds"], expected[1]["prompt_embeds"])
    assert torch.equal(prompts.target[0]["prompt_embeds"], expected[2]["prompt_embeds"])


def test_bad_sliders_are_refused(pipe):
    with pytest.raises(ConfigError, match="both 'a dog', so there is no property"):
        slider_prompts(pipe, SLIDER.replace(positive="a dog"))
    with pytest.raises(ConfigError, match="positive"):
        SliderSettings(positive="", negative="a dog")
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    with pytest.raises(ConfigError, match=r"gradient checkpointing \(unet\)"):
        loss_of(pipe)
