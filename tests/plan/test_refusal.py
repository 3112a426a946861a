"""`train` and its plan: the estimate in the panel, and the refusal of a run that cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_lm
import torch

from lorakit.bases import load as load_file
from lorakit.bases.limits import Memory
from lorakit.errors import ConfigError, TrainError
from lorakit.train import memory as memory_file
from lorakit.train.memory import check
from lorakit.train.progress import Progress
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return tiny_lm.save(folder / "model"), tiny_lm.write_rows(folder / "rows.jsonl", tiny_lm.rows())


@pytest.fixture
def config(files, tmp_path):
    return lambda **changes: tiny_lm.config(*files, tmp_path / "run", steps=2, sample_tokens=0, **changes)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded_or_written(config, monkeypatch):
    monkeypatch.setattr(load_file, "load_model", lambda *a, **k: pytest.fail("the base was loaded"))
    asked = config(memory="50MB")
    with pytest.raises(TrainError) as refused:
        train(asked, QUIET)
    said = str(refused.value)
    assert "this run needs about" in said
    assert "50 MB (the setting 'memory')" in said
    assert "memory: unchecked" in said
    assert "gradient_checkpointing: true" in said
    assert not Path(asked.out).exists()


def test_unchecked_starts_in_any_case(config, monkeypatch):
    monkeypatch.setattr(memory_file, "memory_of", lambda device: Memory(1, 1, "a machine without memory"))
    with pytest.raises(TrainError, match="a machine without memory"):
        train(config(), QUIET)
    assert train(config(memory="unchecked"), QUIET).step == 2


def test_less_being_free_at_the_moment_is_said_and_not_refused(config, monkeypatch):
    monkeypatch.setattr(memory_file, "memory_of", lambda device: Memory(10**12, 10**6, "this machine"))
    job = set_up(config())
    assert job.memory is not None
    assert "1 MB are free now" in job.memory.reason
    assert "of 1 TB (this machine)" in job.memory.reason


def test_the_panel_shows_the_estimate(config, capsys):
    train(config())
    line = next(line for line in capsys.readouterr().out.splitlines() if "memory" in line)
    assert "about" in line
    assert "MB" in line or "GB" in line


def test_a_run_may_go_on_with_another_memory_setting(config):
    train(config(memory="1TB"), QUIET)
    assert train(config(memory="unchecked"), QUIET).step == 2


def test_memory_that_is_no_amount_is_a_wrong_setting(config):
    with pytest.raises(ConfigError, match=r"TrainConfig.memory: 'lots' is not an amount of memory"):
        config(memory="lots")


def test_the_refusal_names_the_largest_micro_batch_that_fits(config, monkeypatch):
    """Rows cost here what a megabyte of activations costs; the machine has room for a few of them."""
    asked = config(batch_size=64, micro_batch=64)
    items = tiny_lm.items([96] * 64)
    monkeypatch.setattr(memory_file, "resident", lambda: 0)
    needed = check(asked.replace(memory="1TB"), torch.float32, CPU, items, 0).value
    few = check(asked.replace(memory="1TB", micro_batch=8), torch.float32, CPU, items, 0).value
    between = (needed.total + few.total) // 2
    with pytest.raises(TrainError) as refused:
        check(asked.replace(memory=f"{between}B"), torch.float32, CPU, items, 0)
    rows = int(str(refused.value).split("micro_batch: ")[1].split()[0])
    assert 8 <= rows < 64
    assert (
        check(asked.replace(memory=f"{between}B", micro_batch=rows), torch.float32, CPU, items, 0).value.total
        <= between
    )


def test_full_fine_tuning_is_told_of_lora(config):
    with pytest.raises(TrainError, match="method: lora needs no gradients"):
        set_up(config(memory="1MB", method="full"))


def test_only_as_many_rows_count_as_are_computed_at_once(config):
    items = tiny_lm.items([96, 8, 8, 8])
    one, four = (check(config(micro_batch=n, memory="1TB"), torch.float32, CPU, items, 0).value for n in (1, 4))
    assert (one.rows, four.rows, one.length) == (1, 4, 96)
    assert one.parts["activations"] < four.parts["activations"]
