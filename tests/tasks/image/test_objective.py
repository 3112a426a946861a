"""Targets and weights against diffusers' own schedulers, and the formulas in float64."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_pipelines import scheduler

from lorakit.errors import ConfigError, TrainError
from lorakit.tasks.image.objective import Objective

KINDS = ("epsilon", "v_prediction", "sample")
T = torch.tensor([0, 1, 250, 500, 998, 999])
X, NOISE = torch.randn(2, len(T), 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_targets_are_those_of_the_scheduler(kind, zero_snr):
    options = {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)
    objective = Objective.of(scheduler(**options))
    torch.testing.assert_close(objective.noised(X, NOISE, T), theirs.add_noise(X, NOISE, T), atol=1e-5, rtol=0)
    expected = {"epsilon": NOISE, "sample": X, "v_prediction": theirs.get_velocity(X, NOISE, T)}[kind]
    torch.testing.assert_close(objective.target(X, NOISE, T), expected, atol=1e-5, rtol=0)
    assert objective.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_noise_come_back_from_a_right_prediction(kind):
    objective = Objective.of(scheduler(prediction_type=kind))
    noised = objective.noised(X.double(), NOISE.double(), T)
    target = objective.target(X.double(), NOISE.double(), T)
    torch.testing.assert_close(objective.clean(target, noised, T), X.double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(objective.noise(target, noised, T), NOISE.double(), atol=1e-9, rtol=0)


def test_flow_matching_is_that_of_the_scheduler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = Objective.of(theirs)
    t = theirs.timesteps[[0, 10, 300, 700, 990, 999]]
    torch.testing.assert_close(objective.noised(X, NOISE, t), theirs.scale_noise(X, t, NOISE), atol=1e-5, rtol=0)
    # The scheduler's step from t to 0 with the target leads to x.
    target = objective.target(X, NOISE, t)
    torch.testing.assert_close(objective.clean(target, objective.noised(X, NOISE, t), t), X, atol=1e-5, rtol=0)
    assert (objective.kind, objective.steps) == ("flow", 1000)


@pytest.mark.parametrize(
    "made",
    [
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_other_schedulers_of_flow_matching(made):
    assert Objective.of(made).kind == "flow"


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "PNDM", "UniPCMultistep", "LCM"])
def test_what_other_samplers_say_is_the_same_diffusion(name):
    theirs = getattr(diffusers, f"{name}Scheduler").from_config(scheduler(prediction_type="v_prediction").config)
    ours, expected = Objective.of(theirs), Objective.of(scheduler(prediction_type="v_prediction"))
    assert ours.kind == expected.kind
    torch.testing.assert_close(ours.noised(X, NOISE, T), expected.noised(X, NOISE, T), atol=1e-6, rtol=0)


def test_a_scheduler_that_does_not_say_what_is_predicted_is_refused():
    for made in (diffusers.ScoreSdeVeScheduler(), diffusers.EDMEulerScheduler()):
        with pytest.raises(TrainError, match=r"has neither alphas_cumprod nor scale_noise.*\n.*DDIMScheduler"):
            Objective.of(made)
    other = scheduler()
    other.register_to_config(prediction_type="guess")
    with pytest.raises(TrainError, match="DDIMScheduler has prediction_type 'guess', which is not known here"):
        Objective.of(other)
    with pytest.raises(TrainError, match="counts its time backwards"):
        Objective.of(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


# ------------------------------------------------------------------------------------- min-SNR


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_the_formula(kind, zero_snr, gamma):
    made = scheduler(prediction_type=kind, rescale_betas_zero_snr=zero_snr)
    t = torch.arange(1000)
    alpha = made.alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    least = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    weights = Objective.of(made).weights(t, gamma)
    if zero_snr:  # 0 / 0; all other weights below γ are 1
        assert snr[-1] == 0
        expected[-1] = 1.0 if kind == "epsilon" else 0.0
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-6)


def test_without_min_snr_every_weight_is_one():
    assert torch.equal(Objective.of(scheduler()).weights(T), torch.ones(len(T)))


def test_a_gamma_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="every weight is zero"):
        Objective.of(scheduler()).weights(T, 0)


def test_min_snr_is_refused_for_flow_matching_with_the_reason():
    with pytest.raises(ConfigError, match=r"one of flow matching\n.*timestep_sampling"):
        Objective.of(diffusers.FlowMatchEulerDiscreteScheduler()).weights(torch.tensor([500.0]), 5.0)
