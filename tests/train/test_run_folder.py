"""A run's folder: whose it is, what may change in it, and its metrics after a crash."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from lorakit.errors import TrainError, WriteError
from lorakit.train.config import TrainConfig, belongs
from lorakit.train.run_folder import FREE, RunFolder, locked_folder


@pytest.fixture
def config(tmp_path):
    return TrainConfig(data="rows.jsonl", out=str(tmp_path / "run"))


@pytest.fixture
def begun(config):
    """A run that has a checkpoint."""
    folder = RunFolder(config.out)
    folder.open(config, "a" * 64)
    (folder.checkpoints / "step-3").mkdir(parents=True)
    return folder


def test_the_config_it_writes_is_the_one_it_was_given(config):
    folder = RunFolder(config.out)
    folder.open(config, "a" * 64)
    assert TrainConfig(**yaml.safe_load(folder.config.read_text())) == config


def test_the_same_run_goes_on(begun, config):
    before = begun.config.read_text()
    begun.open(config, "a" * 64)
    assert begun.config.read_text() == before


def test_a_run_of_a_release_with_fewer_settings_goes_on(begun, config):
    then = yaml.safe_load(begun.config.read_text())
    del then["compile"], then["rslora"]
    begun.config.write_text(yaml.safe_dump(then))
    begun.open(config, "a" * 64)
    with pytest.raises(TrainError, match="compile: was False, is now True"):
        begun.open(config.replace(compile=True), "a" * 64)


def test_other_settings_are_refused_with_the_difference(begun, config):
    with pytest.raises(TrainError) as error:
        begun.open(config.replace(rank=8, learning_rate=1e-3), "a" * 64)
    said = str(error.value)
    assert "rank: was 16, is now 8" in said
    assert "learning_rate: was 'auto', is now 0.001" in said
    assert "alpha" not in said
    assert "--out" in said


def test_other_rows_are_refused(begun, config):
    with pytest.raises(TrainError, match="the tokenized rows: SHA-256 was"):
        begun.open(config, "b" * 64)


def test_settings_that_change_nothing_that_is_computed_may_change(begun, config, tmp_path):
    os.rename(begun.path, tmp_path / "moved")
    changes = {
        "out": str(tmp_path / "moved"),
        "threads": 2,
        "keep": 5,
        "save_every": 7,
        "sample_tokens": 0,
        "sample_prompts": ["x"],
        "track": ["tensorboard"],
        "data": "moved.jsonl",
        "memory": "1TB",
        "date": "2026-01-31",
        "chat_template": "moved.jinja",
        "streaming": True,
        "diverged": "continue",
        "sample_steps": 3,
        "sample_guidance": 2.0,
        "sample_negative": "y",
        "sample_seed": 4,
        "cache": "none",
        "sample_temperature": 0.5,
        "sample_top_p": 0.9,
        "sample_beams": 1,
        "offload_activations": False,  # the run does not checkpoint
    }
    assert changes.keys() == FREE
    own = {name: value for name, value in changes.items() if belongs(name, "lora", "causal_lm")}
    RunFolder(changes["out"]).open(config.replace(**own), "a" * 64)
    assert changes.keys() - own.keys() == {"sample_steps", "sample_guidance", "sample_negative", "sample_seed", "cache"}
    pictures = TrainConfig(data="pictures", task="text_to_image", out=str(tmp_path / "pictures"))
    RunFolder(pictures.out).open(pictures, "a" * 64)
    own = {name: value for name, value in changes.items() if name != "out" and belongs(name, "lora", pictures.task)}
    RunFolder(pictures.out).open(pictures.replace(**own), "a" * 64)


def test_a_run_that_failed_before_its_first_checkpoint_begins_anew_with_any_settings(config):
    folder = RunFolder(config.out)
    folder.open(config, "a" * 64)
    folder.log({"step": 1, "loss": 1.0})
    smaller = config.replace(batch_size=2)
    folder.open(smaller, "b" * 64)
    assert TrainConfig(**yaml.safe_load(folder.config.read_text())) == smaller


@pytest.mark.parametrize("name", ["thesis.txt", "config.yaml", ".hidden", "data.json"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(config, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(TrainError, match="not empty and contains no run"):
        RunFolder(folder).open(config, "a" * 64)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {name: "mine"}


def test_a_file_in_the_folders_place_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(TrainError, match="is a file"):
        RunFolder(tmp_path / "run").open(config, "a" * 64)


def test_an_empty_folder_is_taken(config, tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").open(config, "a" * 64)


def test_a_start_that_was_killed_is_known_again_and_cleared_up(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".rows.sha256.x1.tmp").write_text("")  # killed in its very first write
    RunFolder(folder).open(config, "a" * 64)
    (folder / "config.yaml").unlink()  # killed before its second file
    RunFolder(folder).open(config, "a" * 64)
    (folder / "adapter").mkdir()
    (folder / "adapter" / ".adapter_model.safetensors.x1.tmp").write_text("")
    RunFolder(folder).open(config, "a" * 64)
    assert sorted(p.name for p in folder.rglob("*")) == ["adapter", "config.yaml", "rows.sha256"]


@pytest.mark.parametrize("text", ["rank: [", "just words", ""])
def test_a_config_that_was_damaged_is_an_error_that_names_it(begun, config, text):
    begun.config.write_text(text)
    with pytest.raises(TrainError, match=r"config\.yaml"):
        begun.open(config, "a" * 64)


def test_the_metrics_are_rewound_to_the_checkpoint_and_a_torn_line_is_dropped(begun):
    for step in (1, 2, 3, 4):
        begun.log({"step": step, "loss": 1.0 / step})
    with begun.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in begun.rows()] == [1, 2, 3, 4]
    begun.samples.mkdir()
    for step in (2, 4, 10):
        (begun.samples / f"step-{step}.json").write_text("[]")
    begun.rewind(3)
    begun.log({"step": 4, "loss": 0.5})
    lines = begun.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert [step for step, _ in begun.sampled()] == [2]


def test_a_folder_without_metrics_has_no_rows(begun):
    assert begun.rows() == []
    begun.rewind(0)
    assert begun.metrics.read_text() == ""


def test_a_folder_that_another_run_is_writing_is_refused_and_left_as_it_is(config):
    with locked_folder(RunFolder(config.out).path):
        before = sorted(RunFolder(config.out).path.iterdir())
        with (
            pytest.raises(WriteError, match=r"/run is being written by process \d+\n.*another folder \(--out\)"),
            locked_folder(RunFolder(config.out).path),
        ):
            pytest.fail("both hold it")
        assert sorted(RunFolder(config.out).path.iterdir()) == before
    assert not RunFolder(config.out).path.exists()


def test_lines_of_the_metrics_that_are_damaged_or_gone_are_named(begun):
    for step in (1, 2, 3, 4):
        begun.log({"step": step, "loss": 1.0})
    lines = begun.metrics.read_text().splitlines()
    begun.metrics.write_text("\n".join([lines[0], lines[1][:9], lines[3]]) + "\n")
    assert begun.rewind(4) == [
        f"{begun.metrics}: line 2 was damaged and is left out",
        f"{begun.metrics} has no row of step 2, 3; training is not affected",
    ]
    assert [row["step"] for row in begun.rows()] == [1, 4]


def test_a_last_line_that_a_kill_cut_is_no_damage(begun):
    begun.log({"step": 1, "loss": 1.0})
    with begun.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert begun.rewind(1) == []


def test_a_missing_or_damaged_hash_of_the_rows_is_named_with_the_way_out(begun, config):
    begun.rows_hash.write_text("")
    with pytest.raises(TrainError, match=rf"rows\.sha256 is damaged.*\n.*{'a' * 64}"):
        begun.open(config, "a" * 64)
    begun.rows_hash.unlink()
    with pytest.raises(TrainError, match=rf"rows\.sha256 is missing.*\n.*{'a' * 64}"):
        begun.open(config, "a" * 64)
    begun.rows_hash.write_text("a" * 64)
    begun.open(config, "a" * 64)
