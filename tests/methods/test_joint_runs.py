"""Several runs of a method with updates that are no pair of matrices, side by side on one base, against each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.methods import method_of
from lorakit.train.progress import Progress
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

SHORT = {"steps": 3, "validation": 0.0, "patience": 0, "eval_every": 3, "sample_tokens": 0}


@pytest.mark.parametrize("method", ["bottleneck", "ia3"])
def test_each_ends_as_it_does_alone(method, make_config, tmp_path):
    own = {"bottleneck_size": 4, "activation": "gelu"} if method == "bottleneck" else {}
    config = make_config(method=method, **SHORT, **own)
    values = config.model_dump(exclude_unset=True)
    plan = expand(values | {"out": str(tmp_path / "sweep"), "learning_rate": [1e-2, 3e-2], "seed": [0, 3]})
    sweep(plan, SweepProgress(quiet=True))
    results = []
    for number, each in enumerate(plan.runs.values()):
        alone = train(each.replace(out=str(tmp_path / f"alone-{number}")), Progress(quiet=True))
        theirs = lk.Adapter.load(alone.adapter)
        ours = lk.Adapter.load(Path(each.out) / "adapter")
        assert ours.updates.keys() == theirs.updates.keys()
        for module, update in ours.updates.items():
            for name, tensor in update.tensors().items():
                torch.testing.assert_close(tensor, theirs.updates[module].tensors()[name], atol=2e-4, rtol=1e-3)
        results.append(ours.digest())
    assert len(set(results)) == 4


@pytest.mark.parametrize("method", ["bitfit", "layernorm", "probe"])
def test_copies_of_base_weights_are_not_trained_side_by_side(method, make_config):
    config = make_config(method=method)
    setting, why = method_of(method).alone(config)
    assert setting == f"method: {method}"
    assert "lorakit train" in why
    with pytest.raises(ConfigError, match="side by side"):
        expand({"data": "rows.jsonl", "method": method, "learning_rate": [1e-3, 1e-2]})
