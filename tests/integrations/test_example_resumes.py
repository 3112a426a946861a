"""Each script in examples/ resumes from its checkpoints: on a tiny base, to the bit."""

from __future__ import annotations

import pytest
import tiny_lm
from example_runs import OTHERS, WITH_REFERENCE, module, run

import lorakit as lk


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny base, and the folder of an adapter of it."""
    base = tiny_lm.save(tmp_path_factory.mktemp("small"))
    folder = tmp_path_factory.mktemp("small-sft")
    run("sft", folder, "--model", str(base))
    return base, folder


def letters(completions, **_):
    """A reward that the tiny base gets some of."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.mark.parametrize("name", ("sft", *WITH_REFERENCE, *OTHERS))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, small, tmp_path, monkeypatch):
    base, teacher = small
    monkeypatch.setattr(module("e2e"), "mentioned", letters)
    flags = ["--model", str(base), "--steps", "4", "--save-every", "2", "--learning-rate", "1e-3"]
    flags += ["--teacher", str(teacher)] if name == "gkd" else []
    whole = run(name, tmp_path / "a", *flags)
    again = run(name, tmp_path / "b", *flags, "--resume", str(tmp_path / "a" / "checkpoint-2"))
    trained = [lk.capture(trainer.model, lk.adapters(trainer.model)[-1]).digest() for trainer in (whole, again)]
    assert trained[0] == trained[1]
    assert trained[0] != lk.Adapter.load(tmp_path / "a" / "checkpoint-2").digest()
    assert not list(tmp_path.glob("*/checkpoint-*/model*"))
