"""`lorakit train` and TRL's trainer run the same training, so that their times can be compared."""

from __future__ import annotations

import importlib.util

import pytest

from lorakit.bench import trainer


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("peft") is None,
    reason="TRL and PEFT are the peers",
)
def test_both_trainers_have_the_same_losses_on_the_same_job(tmp_path):
    assert trainer._prepare(tmp_path, steps=4) > 4 * trainer.ROWS_A_STEP
    ours, theirs = (trainer._process(tmp_path, trainer.SIDES[name], 4) for name in ("lorakit fp32", trainer.REFERENCE))
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-3)
    assert max(ours.losses) - min(ours.losses) > 0.01  # constant losses would agree trivially
    assert len(ours.seconds) == len(theirs.seconds) == 3
    assert 0 < ours.peak < theirs.peak


def test_a_failed_run_raises_with_its_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"rows\.jsonl"):
        trainer._process(tmp_path, trainer.SIDES["lorakit fp32"], 1)
