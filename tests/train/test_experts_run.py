"""Runs on a mixture of experts: interrupted and resumed, with B's own rate, with A frozen."""

from __future__ import annotations

import pytest
import tiny_lm
import torch

import lorakit as lk
from lorakit.adapter.experts import ExpertFactors
from lorakit.train import resume
from lorakit.train.progress import Progress
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    from transformers import MixtralConfig, MixtralForCausalLM

    values = tiny_lm.llama().config.to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    values = {k: v for k, v in values.items() if k not in ("architectures", "model_type", "transformers_version")}
    torch.manual_seed(0)
    return tiny_lm.save(tmp_path_factory.mktemp("mixtral"), MixtralForCausalLM(MixtralConfig(**values)))


def factors(adapter) -> dict[str, ExpertFactors]:
    found = {n: u for n, u in lk.Adapter.load(adapter).updates.items() if isinstance(u, ExpertFactors)}
    assert found
    return found


@pytest.mark.parametrize("settings", [{}, {"lora_plus": 4.0}, {"freeze_a": True}], ids=str)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    make_config, mixtral, tmp_path, monkeypatch, settings
):
    config = make_config(model=mixtral, steps=4, save_every=2, dropout=0.1, learning_rate=1e-2, **settings)
    undisturbed = train(config.replace(out=str(tmp_path / "undisturbed")), QUIET)
    assert all(not u.is_zero() for u in factors(undisturbed.adapter).values())
    real, saved = resume.save, []

    def interrupted(*args, **options):
        saved.append(real(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    monkeypatch.undo()
    again = train(config, QUIET)
    assert lk.Adapter.load(again.adapter).digest() == lk.Adapter.load(undisturbed.adapter).digest()


def test_an_adapter_of_experts_alone_can_be_trained_further(make_config, mixtral, tmp_path):
    first = train(make_config(model=mixtral, steps=1, targets=["experts"], out=str(tmp_path / "first")), QUIET)
    again = make_config(model=mixtral, steps=1, adapter=str(first.adapter), out=str(tmp_path / "again"))
    before, after = factors(first.adapter), factors(train(again, QUIET).adapter)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name].B, after[name].B) for name in before)
