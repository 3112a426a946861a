"""Samplers by their names in A1111 and diffusers, with the model's own noise schedule."""

from __future__ import annotations

import diffusers
import pytest

from lorakit.errors import ConfigError
from lorakit.generate.pictures.schedulers import SAMPLERS, choose_scheduler, name_of

CONFIG = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture
def ddim():
    return diffusers.DDIMScheduler(**CONFIG)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "LMS"])
def test_a_scheduler_has_the_name_that_it_was_chosen_by(ddim, name):
    made = choose_scheduler(ddim, name)
    assert name_of(made) == (name, None)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.beta_schedule == "scaled_linear"
    assert choose_scheduler(made, name) is made


@pytest.mark.parametrize(
    "given, expected",
    [
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        ("EulerDiscrete", "EulerDiscreteScheduler"),
        ("dpm++2m", "DPMSolverMultistepScheduler"),
        ("pndm", "PNDMScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
def test_names_are_read_in_any_spelling(ddim, given, expected):
    assert type(choose_scheduler(ddim, given)).__name__ == expected


def test_the_type_of_schedule_is_part_of_the_name_or_given(ddim):
    one = choose_scheduler(ddim, "DPM++ 2M Karras")
    other = choose_scheduler(ddim, "DPM++ 2M", "Karras")
    assert one.config.use_karras_sigmas
    assert other.config.use_karras_sigmas
    assert name_of(one) == ("DPM++ 2M", "Karras")
    assert choose_scheduler(one, "DPM++ 2M Karras") is one
    usual = choose_scheduler(one, "DPM++ 2M")
    assert not usual.config.use_karras_sigmas
    assert choose_scheduler(ddim, "DDIM", "Automatic") is ddim


def test_the_pipelines_own_scheduler_is_kept_with_all_its_settings(ddim):
    assert choose_scheduler(ddim, "DDIM") is ddim
    own = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **CONFIG)
    assert name_of(own) == ("DPMSolverMultistep", None)
    assert choose_scheduler(own, "DPMSolverMultistep") is own
    assert choose_scheduler(own, "DPM++ 2M").config.algorithm_type == "dpmsolver++"


def test_flow_models_have_their_own_euler():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert name_of(flow) == ("Euler", None)
    assert choose_scheduler(flow, "euler") is flow
    heun = choose_scheduler(flow, "Heun")
    assert isinstance(heun, diffusers.FlowMatchHeunDiscreteScheduler)
    assert heun.config.shift == 3.0
    with pytest.raises(ConfigError, match="unknown scheduler 'DDIM'"):
        choose_scheduler(flow, "DDIM")


@pytest.mark.parametrize(
    "name, schedule, message",
    [
        ("DDIMM", None, "unknown scheduler 'DDIMM'.*did you mean 'ddim'"),
        ("", None, "unknown scheduler ''"),
        ("DPM++ 2M", "Karas", "unknown type of schedule 'Karas'; did you mean 'Karras'"),
        ("DDIM", "Karras", "has no schedule of type 'Karras'"),
    ],
)
def test_unknown_names_are_named_with_the_nearest(ddim, name, schedule, message):
    with pytest.raises(ConfigError, match=message):
        choose_scheduler(ddim, name, schedule)
