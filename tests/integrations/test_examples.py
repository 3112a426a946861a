"""Each script in examples/ trains an adapter on the embedded model, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from example_runs import FOLDER, OTHERS, WITH_REFERENCE, run
from transformers import AutoModelForSequenceClassification

import lorakit as lk
from lorakit.bases.load import embedded_folder


@pytest.fixture(scope="module")
def base():
    return lk.load_base("embedded")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return run("sft", folder), folder


def check(trainer, folder: Path, plain) -> None:
    """The adapter is trained and saved, the base is as it was, and the saved adapter gives the same output."""
    model = trainer.model.eval()
    name = lk.adapters(model)[-1]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = lk.capture(model, name)
    assert sum(p.numel() for p in trained.values()) == own.parameters
    assert all(u.tensors()["B"].abs().max() > 0 for u in own.updates.values())
    ids = torch.arange(10, 40).view(2, 15)
    model.__dict__.pop("forward", None)  # TRL's
    with torch.no_grad():
        after = model(input_ids=ids).logits
        again = lk.attach(plain, lk.Adapter.load(folder))(input_ids=ids).logits
        lk.detach(plain)
    torch.testing.assert_close(again, after, rtol=1e-5, atol=1e-5)
    lk.detach(model)
    assert tiny.same_bits(tiny.bits(model), tiny.bits(plain))


def test_sft(taught, base):
    trainer, folder = taught
    check(trainer, folder, base)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_trainer_with_a_reference_adds_no_parameters(name, base, tmp_path):
    trainer = run(name, tmp_path)
    parameters = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.ref_model.parameters()} <= parameters
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    check(trainer, tmp_path, base)


def test_orpo(base, tmp_path):
    check(run("orpo", tmp_path), tmp_path, base)


def test_gkd_teaches_one_adapter_with_another(taught, base, tmp_path):
    trainer = run("gkd", tmp_path, "--teacher", str(taught[1]))
    parameters = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.teacher_model.parameters()} <= parameters
    check(trainer, tmp_path, base)


def test_reward(tmp_path):
    trainer = run("reward", tmp_path)
    torch.manual_seed(99)  # another head
    plain = AutoModelForSequenceClassification.from_pretrained(embedded_folder(), num_labels=1, dtype=torch.float32)
    head = plain.score.weight.detach().clone()
    model = trainer.model.eval()
    ids = torch.arange(10, 40).view(2, 15)
    with torch.no_grad():
        after = model(input_ids=ids).logits
        again = lk.attach(plain, lk.Adapter.load(tmp_path)).eval()(input_ids=ids).logits
    torch.testing.assert_close(again, after, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain.score.weight, head)
    assert "score.weight" in lk.capture(model).saved


def test_every_example_with_a_trainer_is_run_here():
    scripts = {path.stem for path in FOLDER.glob("*.py") if "adapter_trainer(" in path.read_text(encoding="utf8")}
    assert scripts == {"sft", *WITH_REFERENCE, *OTHERS}
