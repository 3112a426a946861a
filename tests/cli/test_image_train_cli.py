"""`lorakit image train`, and what goes with it: the same command as `train --task text_to_image`, init and plan."""

from __future__ import annotations

import json

import pytest
import tiny_pictures
import yaml

from lorakit.tasks import task_of
from lorakit.train.config import TrainConfig

SHORT = ("--steps", 2, "--rank", 2, "--batch-size", 2, "--threads", 1, "--precision", "fp32", "--sample-steps", 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return tiny_pictures.save_pipeline(folder / "sd1"), tiny_pictures.write_pictures(folder / "pictures", 4)


def test_image_train_is_train_with_the_task_and_says_what_its_file_holds(lorakit, places, tmp_path):
    model, pictures = places
    first, second = tmp_path / "image/run", tmp_path / "task/run"  # the file has the run's name
    code, out, err = lorakit("image", "train", pictures, "--model", model, "--out", first, *SHORT)
    assert code == 0, err
    assert "(unet: " in out
    assert f"next: lorakit image generate 'your prompt' --model {model} --adapter {first}/adapter" in out
    code, out, err = lorakit(
        "train", "--task", "text-to-image", "--data", pictures, "--model", model, "--out", second, "--json", *SHORT
    )
    assert code == 0, err
    assert json.loads(out)["step"] == 2
    file = "adapter/run.safetensors"
    assert (first / file).read_bytes() == (second / file).read_bytes()
    configs = [yaml.safe_load((path / "config.yaml").read_text()) for path in (first, second)]
    assert configs[0] | {"out": None} == configs[1] | {"out": None}


def test_help_has_what_pictures_have_and_nothing_that_only_text_has(lorakit):
    code, out, _ = lorakit("image", "train", "--help")
    assert code == 0
    for flag in ("--resolution", "--prior-count", "--min-snr", "--slider-positive", "--text-encoder-learning-rate"):
        assert flag in out
    for flag in ("--max-length", "--packing", "--chat-template", "--labels"):
        assert flag not in out


def test_init_writes_the_tasks_own_defaults(lorakit, tmp_path):
    path = tmp_path / "pictures.yaml"
    code, _, err = lorakit("init", path, "--task", "text_to_image", "--data", "pictures")
    assert code == 0, err
    text = path.read_text()
    assert "# steps: 1000" in text
    assert "max_length" not in text
    config = TrainConfig(**yaml.safe_load(text))
    assert config == TrainConfig(task="text_to_image", data="pictures")
    assert (config.alpha, config.batch_size, config.targets) == (16, 4, "kohya")


def test_epochs_that_are_given_decide_the_steps_and_a_tasks_defaults_do_not_count_as_given():
    config = TrainConfig(task="text_to_image", data="x", epochs=5)
    assert config.steps is None
    assert config.model_fields_set == {"task", "data", "epochs"}
    assert config.replace(task="causal_lm").alpha == 32
    assert task_of("causal_lm").defaults({}) == {}


def test_no_pictures_are_a_usage_error(lorakit):
    code, _, err = lorakit("image", "train")
    assert code == 2
    assert "no pictures" in err


def test_plan_counts_what_a_run_holds_and_says_what_it_leaves_out(lorakit, places):
    model, _ = places
    code, out, err = lorakit("plan", "--task", "text_to_image", "--model", model)
    assert code == 0, err
    assert "activations are not estimated for pictures" in out
    code, out, _ = lorakit("plan", "--task", "text_to_image", "--model", model, "--json", "--precision", "fp32")
    parts = json.loads(out)["estimate"]["parts"]
    assert parts["optimizer"] == 2 * parts["gradients"] > 0
    assert parts["unet"] > parts["adapter"]


def test_a_slider_is_trained_without_data_from_the_command_line(lorakit, places, tmp_path):
    model, _ = places
    slider = ("--slider-positive", "a red cat", "--slider-negative", "a dog", "--slider-steps", 1)
    code, _, err = lorakit("image", "train", "--model", model, "--out", tmp_path / "slider", *slider, *SHORT)
    assert code == 0, err
    assert (tmp_path / "slider/adapter/slider.safetensors").is_file()
