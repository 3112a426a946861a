"""Settings of a run on pictures that would have no effect are refused, with what they are for."""

from __future__ import annotations

import re

import pytest
import tiny_pictures

from lorakit.errors import ConfigError
from lorakit.methods import method_of
from lorakit.tasks import task_names, task_of
from lorakit.tasks.image.encoded import Pictures
from lorakit.tasks.image.slider_run import Slider
from lorakit.tasks.text_to_image import TextToImageSettings
from lorakit.train.config import belongs

SLIDER = {"data": "none", "slider_positive": "an old person", "slider_negative": "a young person"}


def processor(tmp_path, **changes):
    places = {"model": tmp_path, "data": tmp_path, "out": tmp_path / "run"}
    return task_of("text_to_image").processor(tiny_pictures.config(**places | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slider_target": "person"}, "slider_target is for a slider; give slider_positive"),
        ({"slider_strength": 2.0}, "slider_strength is for a slider"),
        ({"prior_caption": "a dog"}, "prior_caption is for pictures of the class; give them (prior_data), or how many"),
        ({"prior_weight": 0.5}, "prior_weight is for pictures of the class"),
        ({"token_vectors": 2}, "token_vectors is for words to learn; give new_tokens"),
        ({"buckets": False, "bucket_max": 64}, "bucket_max limits the sides of buckets"),
        ({"logit_std": 0.5, "timestep_sampling": "uniform"}, "logit_std is for logit-normal timesteps"),
        ({"text_encoder_learning_rate": 1e-5}, "text_encoder_learning_rate: no text encoder is trained"),
        ({"text_encoder_learning_rate": 1e-5, "components": ["unet"]}, "such as components: [unet, text_encoder]"),
        (
            {"text_encoder_learning_rate": {"text_encoder2": 1e-5}, "components": ["unet", "text_encoder_2"]},
            "'text_encoder2' is not trained; did you mean 'text_encoder_2'?",
        ),
        ({"trust_remote_code": True}, "trust_remote_code: task text_to_image does not have it"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        processor(tmp_path, **changes)


OF_TEXT = {
    "chat_template": "file.jinja",
    "chat_template_kwargs": {"a": 1},
    "date": "2026-01-01",
    "labels": ["a", "b"],
    "max_length": 64,
    "mix": {"a.jsonl": 0.5},
    "on_long": "cut",
    "packing": True,
    "random_crop": 0.5,
    "sample_tokens": 3,
    "streaming": True,
    "template": "plain",
    "train_on": "all",
    "turns": "last",
}


@pytest.mark.parametrize("name", OF_TEXT)
def test_settings_of_other_tasks_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} has no effect with task: text_to_image; remove it"):
        processor(tmp_path, **{name: OF_TEXT[name]})


def test_no_setting_of_another_task_alone_has_an_effect():
    """The rule by which those above are refused, for all there are."""
    fields = {field for name in task_names() for field in task_of(name).settings.model_fields}
    others = fields - set(TextToImageSettings.model_fields) - set(method_of("lora").settings.model_fields)
    assert set(OF_TEXT) <= others
    assert not [name for name in others if belongs(name, "lora", "text_to_image")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True}, "flip: a slider is trained without pictures, so it has no effect"),
        ({"crop": "random"}, "crop: a slider is trained without pictures"),
        ({"trigger": "sks"}, "trigger: a slider"),
        ({"mask": "alpha"}, "mask: a slider"),
        ({"caption_dropout": 0.1}, "caption_dropout: a slider"),
        ({"noise_offset": 0.05, "repeats": {"a": 2}}, "remove repeats, noise_offset"),
        ({"validation": 0.1}, "validation: a slider"),
        ({"prior_count": 2, "prior_caption": "a dog"}, "remove prior_caption, prior_count"),
        ({"new_tokens": {"<a>": ""}}, "new_tokens: a slider"),
        ({"split": "train"}, "split: a slider"),
        ({"components": ["unet", "text_encoder"]}, "components: text_encoder: a slider's prompts are encoded once"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: a slider cannot be trained with it"),
        ({"data": "pictures"}, "data: pictures: a slider is trained from prompts"),
        ({"slider_steps": 2000}, "slider_steps"),
    ],
)
def test_a_slider_refuses_what_it_would_not_use(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        processor(tmp_path, **SLIDER | changes)


def test_settings_with_an_effect_are_taken(tmp_path):
    assert isinstance(processor(tmp_path, **SLIDER, resolution=64, min_snr=5, slider_strength=2.0), Slider)
    pictures = processor(
        tmp_path,
        prior_caption="a dog",
        prior_weight=0.5,
        prior_count=2,
        buckets=False,
        bucket_step=8,  # of pictures that are smaller than the square
        new_tokens={"<a>": ""},
        token_vectors=2,
        text_encoder_learning_rate=1e-5,  # of the new words
        logit_std=0.5,
        sample_tokens=0,  # as runs of a sweep have it
    )
    assert type(pictures) is Pictures


def test_each_text_encoder_may_have_a_rate_of_its_own(tmp_path):
    rates = {"text_encoder": 1e-5, "text_encoder_2": 2e-5}
    components = ["unet", *rates, "text_encoder_3"]
    config = tiny_pictures.config(
        tmp_path, tmp_path, tmp_path / "run", components=components, text_encoder_learning_rate=rates
    )
    factor = task_of("text_to_image").rate_factor
    assert {name: factor(config, f"{name}.layer.lora_default.A", 1e-4) for name in components} == {
        "unet": ("", 1.0),
        "text_encoder": ("text_encoder", pytest.approx(0.1)),
        "text_encoder_2": ("text_encoder_2", pytest.approx(0.2)),
        "text_encoder_3": ("", 1.0),
    }
    one = config.replace(text_encoder_learning_rate=1e-5)
    assert factor(one, "text_encoder_3.layer.lora_default.A", 1e-4) == ("text_encoder", pytest.approx(0.1))
