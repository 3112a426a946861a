"""Checkpoints: whole or not there, and what is taken up from them is what was saved, to the bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError, TrainError, WriteError
from lorakit.train import resume


@pytest.fixture
def trained():
    """(model, optimizer) after two steps; one parameter is frozen."""

    def make(steps: int = 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        model[0].bias.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    return make


def save(folder, step, model, optimizer, best=None, keep=2, **state):
    return resume.save(folder, step, model, optimizer, best or {}, state, keep)


def test_a_restored_run_takes_the_same_next_step_to_the_bit(trained, tmp_path):
    model, optimizer = trained()
    best = {"0.weight": torch.randn(4, 3)}
    save(tmp_path, 2, model, optimizer, best, note="kept")
    loaded = resume.load_newest(tmp_path)
    assert loaded.state == {"step": 2, "note": "kept"}
    assert torch.equal(loaded.best["0.weight"], best["0.weight"])
    other, other_optimizer = trained(0)
    resume.restore(loaded, other, other_optimizer)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(torch.ones(1, 3)).square().sum().backward()
        o.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name
    assert "0.bias" not in loaded.parameters


def test_the_newest_are_kept_by_number_not_by_name(trained, tmp_path):
    model, optimizer = trained()
    for step in (2, 9, 10, 100):
        save(tmp_path, step, model, optimizer, keep=3)
    assert resume.steps_in(tmp_path) == [9, 10, 100]
    assert resume.load_newest(tmp_path).state["step"] == 100


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert resume.steps_in(tmp_path / "nowhere") == []
    assert resume.load_newest(tmp_path / "nowhere") is None
    (tmp_path / "step-x").mkdir()
    assert resume.load_newest(tmp_path) is None


def test_a_write_that_failed_leaves_the_old_checkpoint_and_nothing_else(trained, tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="no space left"):
        save(tmp_path, 2, model, optimizer)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_write_that_was_killed_is_cleared_away(trained, tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save(tmp_path, 2, model, optimizer)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert any(name.startswith(resume.TEMPORARY) for name in os.listdir(tmp_path))
    assert resume.load_newest(tmp_path).state["step"] == 1
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_a_checkpoint_of_other_parameters_is_refused_by_name(trained, tmp_path, change):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    model[0].bias.requires_grad_(True) if change == "more" else model[1].weight.requires_grad_(False)
    with pytest.raises(TrainError, match="0.bias" if change == "more" else "1.weight"):
        resume.restore(resume.load_newest(tmp_path), model, optimizer)


def test_a_damaged_file_is_named(trained, tmp_path):
    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LorakitError, match=r"optimizer\.safetensors"):
        resume.load_newest(tmp_path)


def test_parameters_in_two_places_are_saved_once_and_all_there_again(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model["b"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    value = model["a"].weight.detach().clone()
    save(tmp_path, 1, model, optimizer)
    with torch.no_grad():
        model["a"].weight.zero_()
    resume.restore(resume.load_newest(tmp_path), model, optimizer)
    assert torch.equal(model["b"].weight, value)


def test_old_ones_whose_removal_was_killed_go_at_the_next_start(trained, tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, keep=3)
    (tmp_path / "step-1" / "state.json").unlink()
    resume.prune(tmp_path, 2)
    assert resume.steps_in(tmp_path) == [2, 3]


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(trained, tmp_path, name, damage):
    model, optimizer = trained()
    best = {"0.weight": torch.randn(4, 3)}
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, best, early_stop={"best_loss": 1.0})
    DAMAGE[damage](tmp_path / "step-2" / name)
    notes = []
    assert resume.load_newest(tmp_path, notes.append).state["step"] == 1
    (note,) = notes
    assert f"step-2/{name}" in note
    assert note.endswith("kept as damaged-step-2, resuming from step-1")
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-2", "step-1"]
    assert resume.load_newest(tmp_path, pytest.fail).state["step"] == 1
    DAMAGE[damage](tmp_path / "step-1" / name)
    with pytest.raises(TrainError, match=rf"(?s)no checkpoint of .* can be read:.*step-1/{name}.*\n  delete"):
        resume.load_newest(tmp_path)
    assert (tmp_path / "step-1").exists()


def test_a_rename_that_fails_leaves_the_checkpoint_of_the_same_step(trained, tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, note="old")
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(WriteError):
        save(tmp_path, 1, model, optimizer, note="new")
    assert os.listdir(tmp_path) == ["step-1"]
    assert resume.load_newest(tmp_path).state["note"] == "old"


@pytest.fixture
def remembering(tiny_mlp):
    """(model, optimizer, updates) with two adapters, each update with a persistent buffer and one that is not."""
    for name in ("default", "other"):
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets="all-linear"), name)
    updates = {n: m for n, m in tiny_mlp.named_modules() if n.endswith((".lora_default", ".lora_other"))}
    for i, update in enumerate(updates.values()):
        update.register_buffer("importances", torch.full((2,), float(i)))
        update.register_buffer("recomputed", torch.full((2,), -1.0), persistent=False)
    optimizer = torch.optim.AdamW([p for p in tiny_mlp.parameters() if p.requires_grad], lr=0.1, fused=True)
    return tiny_mlp, optimizer, updates


def test_persistent_buffers_of_an_adapters_updates_are_restored_to_the_bit_and_no_others(remembering, tmp_path):
    model, optimizer, updates = remembering
    before = {name: update.importances.clone() for name, update in updates.items()}
    assert len(resume.buffers(model, "other")) == len(updates) / 2
    assert all(name.endswith(".lora_default.importances") for name in resume.buffers(model, "other"))
    path = resume.save(tmp_path, 3, model, optimizer, {}, {}, 2, "other")
    for update in updates.values():
        update.importances += 0.1
        update.recomputed += 0.1
    loaded = resume.read(path)
    assert loaded.buffers.keys() == resume.buffers(model, "other").keys()
    resume.restore(loaded, model, optimizer, "other")
    for name, update in updates.items():
        kept = before[name] if name.endswith("lora_other") else before[name] + 0.1
        assert torch.equal(update.importances, kept), name
        assert torch.equal(update.recomputed, torch.full((2,), -0.9)), name


def test_a_checkpoint_with_other_buffers_or_without_their_file_is_refused(remembering, tmp_path):
    model, optimizer, updates = remembering
    path = save(tmp_path, 1, model, optimizer)
    del next(iter(updates.values()))._buffers["importances"]
    with pytest.raises(TrainError, match=r"buffers differ .*importances"):
        resume.restore(resume.read(path), model, optimizer)
    (path / "buffers.safetensors").unlink()
    with pytest.raises(TrainError, match=r"buffers\.safetensors"):
        resume.read(path)


def test_a_checkpoint_without_buffers_has_no_file_of_them(trained, tmp_path):
    path = save(tmp_path, 1, *trained())
    assert not (path / "buffers.safetensors").exists()
    assert "buffers" not in resume.read(path).state


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_frozen_a_of_lora_fa_is_there_again_whatever_was_drawn(tmp_path, init):
    def attached(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        torch.manual_seed(seed)
        return lk.attach(model, lk.LoraConfig(rank=2, targets=["0"], freeze_a=True, init=init))

    model, other = attached(1), attached(2)
    with torch.no_grad():
        model[0].lora_default.A.mul_(1.5)  # another machine's singular vectors, or random numbers
        model[0].lora_default.B.normal_()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (model, other)]
    save(tmp_path, 1, model, optimizers[0])
    assert resume.newest_ranks(tmp_path) == {"0": 2}
    resume.restore(resume.load_newest(tmp_path), other, optimizers[1])
    x = torch.randn(3, 6)
    assert torch.equal(model(x), other(x))
