"""A run that an earlier release began (tests/fixtures/run_of_0.1) goes on, and ends as that release would have ended
it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorakit.errors import TrainError
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

OLD = Path(__file__).parents[1] / "fixtures" / "run_of_0.1"


@pytest.fixture
def config(tmp_path):
    """The old run's own, with its folder copied."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    return TrainConfig(**values | {"data": str(OLD / "rows.jsonl"), "out": str(tmp_path / "run")})


def test_it_goes_on_and_ends_as_it_would_have(config):
    """Other machines round otherwise: figures are compared to a few units of their last digit."""
    result = train(config, Progress(quiet=True))
    assert (result.step, result.stopped) == (8, None)
    expected = [json.loads(line) for line in (OLD / "ended" / "metrics.jsonl").read_text().splitlines()]
    rows = RunFolder(config.out).rows()
    assert rows[:6] == expected[:6]  # what had been logged before
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), (row["step"], name)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (result.adapter, OLD / "ended"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_other_settings_are_still_told_apart(config):
    with pytest.raises(TrainError, match="rank: was 2, is now 3") as error:
        train(config.replace(rank=3), Progress(quiet=True))
    assert len(str(error.value).splitlines()) == 3  # the rank alone differs
