"""One interface for nine families: the pipeline's own call under a catching scheduler (`bases.pipeline`)."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from tiny import randomise_factors
from tiny_families import FAMILIES, OTHERS, ROWS

import lorakit as lk
from lorakit.bases.pipeline import PipelineModel, as_module
from lorakit.errors import TrainError
from lorakit.tasks.image.loss import predict
from lorakit.tasks.image.objective import Objective
from lorakit.tasks.image.packing import layout_of
from lorakit.tasks.image.prompts import take_rows

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(params=[*FAMILIES, *OTHERS])
def family(request):
    return {**FAMILIES, **OTHERS}[request.param]()


def timesteps(pipe) -> torch.Tensor:
    """A different timestep for each row."""
    objective = Objective.of(pipe.scheduler)
    t = torch.tensor([0.1, 0.5, 0.9]) * objective.steps
    return t if objective.kind == "flow" else t.long()


def prediction(family, rows, t):
    model = as_module(family.pipe)
    layout = layout_of(model, family.latents, family.prompts)
    return predict(model, layout, family.latents[rows], t[rows], take_rows(family.prompts, rows))


def test_all_factors_have_gradients(family):
    model = as_module(family.pipe)
    lk.attach(family.pipe, lk.LoraConfig(rank=2, targets=TARGETS))
    randomise_factors(model)
    prediction(family, [0, 1, 2], timesteps(family.pipe)).square().sum().backward()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert factors
    dead = [name for name, p in factors.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_a_batch_of_mixed_timesteps_equals_its_rows_one_by_one(family):
    t = timesteps(family.pipe)
    with torch.no_grad():
        together = prediction(family, [0, 1, 2], t)
        alone = torch.cat([prediction(family, [row], t) for row in range(ROWS)])
    assert together.isfinite().all()
    assert not torch.allclose(together[0], together[1])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_pipeline_is_as_before(family):
    pipe = family.pipe
    before = {name: id(value) for name, value in vars(pipe).items() if name != "_lorakit_model"}
    config, scheduler, own = dict(pipe.config), dict(vars(pipe.scheduler)), type(pipe)
    prediction(family, [0, 1, 2], timesteps(pipe))
    with pytest.raises((TypeError, ValueError)):  # no prompts
        as_module(pipe)(family.latents, timesteps(pipe))
    assert {name: id(value) for name, value in vars(pipe).items() if name != "_lorakit_model"} == before
    assert dict(pipe.config) == config
    assert type(pipe) is own
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(value is scheduler[name] for name, value in vars(pipe.scheduler).items())


def test_random_numbers_of_torch_are_left_alone_by_the_probe(family):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    layout_of(as_module(family.pipe), family.latents, family.prompts)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_to_the_unet_itself():
    family = FAMILIES["sd1"]()
    t = timesteps(family.pipe)
    with torch.no_grad():
        ours = prediction(family, [0, 1, 2], t)
        theirs = family.pipe.unet(family.latents, t, encoder_hidden_states=family.prompts["prompt_embeds"]).sample
    assert torch.equal(ours, theirs)


def test_equal_to_the_transformer_itself():
    """Z-Image's reversed time and sign are the pipeline's own doing."""
    family = FAMILIES["z_image"]()
    t = timesteps(family.pipe)
    with torch.no_grad():
        ours = prediction(family, [0, 1, 2], t)
        given = [row[:, None] for row in family.latents]
        theirs = family.pipe.transformer(given, (1000 - t) / 1000, family.prompts["prompt_embeds"])[0]
    torch.testing.assert_close(ours, -torch.stack(list(theirs))[:, :, 0], atol=1e-6, rtol=0)


def test_what_a_scheduler_does_to_latents_is_left_out():
    """Euler's scales its latents, at the start and before the denoiser; ours are noised as the denoiser takes them."""
    family = FAMILIES["sd1"]()
    t = timesteps(family.pipe)
    with torch.no_grad():
        expected = prediction(family, [0, 1, 2], t)
        family.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(family.pipe.scheduler.config)
        assert torch.equal(prediction(family, [0, 1, 2], t), expected)


# ------------------------------------------------------------------------------------- two experts


def test_two_experts_each_predict_their_part_of_the_timesteps():
    family = FAMILIES["wan"]()
    torch.manual_seed(1)
    second = diffusers.WanTransformer3DModel.from_config(family.pipe.transformer.config).eval()
    vars(family.pipe)["transformer_2"] = second
    family.pipe.register_to_config(boundary_ratio=0.6)
    t = timesteps(family.pipe)
    with torch.no_grad():
        ours = prediction(family, [0, 1, 2], t)
        experts = [second, second, family.pipe.transformer]  # t = 100, 500, 900; the boundary is 600
        for row, expert in enumerate(experts):
            one = slice(row, row + 1)
            theirs = expert(family.latents[one], t[one], family.prompts["prompt_embeds"][one]).sample
            torch.testing.assert_close(ours[one], theirs, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- refused


def test_a_pipeline_without_latents_is_refused():
    class NoLatents(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt=None):
            return prompt

    pipe = NoLatents(**tiny.tiny_sd1().components, requires_safety_checker=False)
    with pytest.raises(TrainError, match=r"NoLatents takes no latents.*\n.*expected a text-to-image pipeline"):
        as_module(pipe)(torch.zeros(1, 4, 8, 8), torch.tensor([1]))


def test_a_pipeline_that_takes_no_step_is_refused():
    class NoStep(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt=None, latents=None):
            return self.unet(latents, 1, encoder_hidden_states=torch.zeros(len(latents), 2, tiny.WIDTH))

    pipe = NoStep(**tiny.tiny_sd1().components, requires_safety_checker=False)
    with pytest.raises(TrainError, match="NoStep never called its scheduler's step"):
        as_module(pipe)(torch.zeros(1, 4, 8, 8), torch.tensor([1]))


def test_a_pipeline_without_a_denoiser_is_refused():
    pipe = tiny.tiny_sd1()
    vars(pipe)["unet"] = None
    with pytest.raises(TrainError, match=r"no denoiser: none of its components is a unet or a transformer\n.*vae"):
        as_module(pipe)(torch.zeros(1, 4, 8, 8), torch.tensor([1]))


def test_another_number_of_rows_is_refused():
    family = FAMILIES["sd1"]()

    class Doubled(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt=None, latents=None):
            self.scheduler.step(torch.cat([latents, latents]), 1, latents)

    pipe = Doubled(**family.pipe.components, requires_safety_checker=False)
    with pytest.raises(TrainError, match=r"predicted 2 rows for 1 rows.*\n.*guidance"):
        as_module(pipe)(family.latents[:1], torch.tensor([1]))


def test_only_pipelines_become_a_pipeline_model():
    pipe = tiny.tiny_sd1()
    model = as_module(pipe)
    assert isinstance(model, PipelineModel)
    assert as_module(pipe) is model
    assert as_module(model) is model
    assert as_module(pipe.unet) is pipe.unet
    assert list(dict(model.named_children())) == ["unet", "text_encoder"]
    other = SimpleNamespace(components=3)
    assert as_module(other) is other


def test_training_mode_is_for_components_that_are_trained():
    """A frozen text encoder with dropout, such as T5, must not drop out parts of the prompts."""
    pipe = FAMILIES["sd3"]().pipe
    lk.attach(pipe, lk.LoraConfig(rank=2, targets=["to_q"]))
    model = as_module(pipe).train()
    assert model.training
    for name, component in model.components.items():
        assert {module.training for module in component.modules()} == {name == "transformer"}, name
    assert not any(module.training for module in model.train(False).modules())
