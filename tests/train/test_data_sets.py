"""Runs on several data sets, and on one that stays on disk: the same bits, resumed too."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import tiny_lm
from rich.console import Console

from lorakit.cli import run
from lorakit.errors import ConfigError, DataError
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture
def others(tmp_path):
    rows = [{"prompt": f"{name} says ", "completion": f"{name}!"} for name in tiny_lm.NAMES]
    return tiny_lm.write_rows(tmp_path / "others.jsonl", rows)


def result_of(config):
    folder = RunFolder(config.out)
    return [(folder.adapter / name).read_bytes() for name in ("adapter_model.safetensors", "lorakit.json")]


def test_a_streaming_run_has_the_bits_of_one_in_memory_and_goes_on_either_way(make_config, others, tmp_path):
    memory = make_config(out=tmp_path / "memory", mix={str(others): 0.3}, dropout=0.1, save_every=2, keep=3)
    train(memory, QUIET)
    disk = memory.replace(out=str(tmp_path / "disk"), streaming=True)
    train(disk, QUIET)
    assert result_of(disk) == result_of(memory)
    for step in (4, 6):
        shutil.rmtree(RunFolder(disk.out).checkpoints / f"step-{step}")
    train(disk, QUIET)
    assert result_of(disk) == result_of(memory)
    shutil.rmtree(RunFolder(disk.out).checkpoints / "step-6")
    train(disk.replace(streaming=False), QUIET)
    assert result_of(disk) == result_of(memory)


def test_an_epoch_has_the_shares_and_nothing_held_out_is_trained(make_config, others):
    job = set_up(make_config(mix={str(others): 0.25}, steps=None, epochs=2, batch_size=4))
    first, second = job.train.parts
    per_epoch = -(-job.data.rows // 4)
    assert job.steps == 2 * per_epoch
    for epoch in range(2):
        rows = [item for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for item in job.batch(step)]
        mine = [item for item in rows if item.row.file == str(others)]
        assert sorted(item.where for item in rows if item not in mine) == sorted(item.where for item in first)
        assert len(mine) == round(len(first) / 3)
    held = {item.split_key for item in job.held_out}
    assert not held & {item.split_key for item in job.train}
    assert len(first) + len(second) + len(job.held_out) == 24 + 12


def test_a_prompt_of_both_sets_is_held_out_of_both(make_config, data_file, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(data_file, copy)
    job = set_up(make_config(mix={str(copy): 0.5}))
    assert not {item.split_key for item in job.held_out} & {item.split_key for item in job.train}


def test_the_panel_names_the_sets_and_their_rows(make_config, others):
    screen = io.StringIO()
    train(make_config(mix={str(others): 0.25}, validation=0), Progress(Console(file=screen, width=300)))
    assert "mixed with" in screen.getvalue()
    assert "(25%: 8 rows an epoch, of 12)" in screen.getvalue()


def test_other_shares_are_another_run(make_config, others):
    config = make_config(mix={str(others): 0.25}, save_every=2)
    train(config, QUIET)
    with pytest.raises(Exception, match="mix: was"):
        train(config.replace(mix={str(others): 0.5}), QUIET)


def test_what_cannot_be_mixed_is_an_error(make_config, others, tmp_path):
    with pytest.raises(ConfigError, match="leaves nothing for the first"):
        make_config(mix={str(others): 1 - 1e-9, "b": 0.5})
    with pytest.raises(DataError, match="no such file"):
        train(make_config(mix={str(tmp_path / "nowhere.jsonl"): 0.5}), QUIET)
    labelled = [{"text": n, "label": label} for n in tiny_lm.NAMES for label in ("a", "b")]
    data = tiny_lm.write_rows(tmp_path / "labelled.jsonl", labelled)
    with pytest.raises(ConfigError, match="streaming has no effect with task: classification"):
        train(make_config(task="classification", data=data, streaming=True), QUIET)


def test_flags_name_sets_and_shares(model_folder, data_file, others, tmp_path):
    out = tmp_path / "flags"
    flags = ["train", "--data", str(data_file), "--model", str(model_folder), "--out", str(out), *tiny_lm.FLAGS]
    assert run([*flags, "--mix", f"{others}=0.25", "--streaming"]) == 0
    assert json.loads((out / "adapter" / "lorakit.json").read_text())["recipe"]["mix"] == {str(others): 0.25}
