"""Training an attached adapter with settings of its own: LoRA+ and LoRA-FA beside PEFT's, in a loop of one's own."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from peft.optimizers import create_loraplus_optimizer

import lorakit as lk
from lorakit.errors import ConfigError, StateError, TargetError

TARGETS = ["q_proj", "down_proj"]
STEPS = 4


def loss_of(model, seed: int = 0):
    ids = torch.randint(1, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def in_peft(model, tmp_path):
    """The same adapter on the same base, trainable in PEFT."""
    lk.capture(model).save(tmp_path)
    return peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)


def trained_here(model, optimizer) -> lk.Adapter:
    for step in range(STEPS):
        (loss_of(model, step) + lk.penalty(model)).backward()
        optimizer.step()
        lk.after_step(model, step + 1, STEPS)
        optimizer.zero_grad()
    return lk.capture(model)


def trained_there(model, optimizer, folder) -> lk.Adapter:
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return lk.Adapter.load(folder)


def assert_close(ours: lk.Adapter, theirs: lk.Adapter) -> None:
    assert ours.updates.keys() == theirs.updates.keys()
    for module, update in ours.updates.items():
        for name, tensor in update.tensors().items():
            torch.testing.assert_close(tensor, theirs.updates[module].tensors()[name], rtol=1e-4, atol=1e-6)


def moved(before: lk.Adapter, after: lk.Adapter, factor: str) -> float:
    """The mean change of a factor's elements."""
    changes = [
        (u.tensors()[factor] - before.updates[m].tensors()[factor]).abs().mean() for m, u in after.updates.items()
    ]
    return float(torch.stack(changes).mean())


def test_lora_plus_trains_b_at_its_rate_as_pefts_optimizer_does(tiny_llama, tmp_path):
    lk.attach(tiny_llama, lk.LoraConfig(rank=4, targets=TARGETS, lora_plus=16))
    tiny.randomise_factors(tiny_llama)
    theirs = in_peft(tiny_llama, tmp_path / "start")
    groups = lk.parameter_groups(tiny_llama, 1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]
    ours = trained_here(tiny_llama, torch.optim.AdamW(groups, weight_decay=0.0))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    there = trained_there(theirs, optimizer, tmp_path / "end")
    assert_close(ours, there)
    start = lk.Adapter.load(tmp_path / "start")
    assert moved(start, ours, "B") == pytest.approx(16 * moved(start, ours, "A"), rel=0.3)


def test_groups_without_lora_plus_are_one_and_an_argument_overrules_the_config(tiny_llama):
    with pytest.raises(StateError, match="no parameter"):
        lk.parameter_groups(tiny_llama.requires_grad_(False), 1e-3)
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=TARGETS))
    (group,) = lk.parameter_groups(tiny_llama, 1e-3)
    assert len(group["params"]) == 8
    slow, fast = lk.parameter_groups(tiny_llama, 1e-3, lora_plus=4)
    assert (fast["lr"], len(slow["params"]), len(fast["params"])) == (4e-3, 4, 4)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="lora_plus is"):
            lk.parameter_groups(tiny_llama, 1e-3, lora_plus=bad)


def test_an_embedding_keeps_the_rate_of_a_and_alone_has_nothing_for_lora_plus(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["embed_tokens", "q_proj"], lora_plus=16))
    slow, fast = lk.parameter_groups(tiny_llama, 1e-3)
    assert (len(slow["params"]), len(fast["params"])) == (4, 2)
    lk.detach(tiny_llama)
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["embed_tokens"]))
    with pytest.raises(ConfigError, match="no update of this adapter"):
        lk.parameter_groups(tiny_llama, 1e-3, lora_plus=16)


def test_lora_fa_trains_b_alone_as_peft_with_a_frozen_a_does(tiny_llama, tmp_path):
    lk.attach(tiny_llama, lk.LoraConfig(rank=4, targets=TARGETS, freeze_a=True))
    tiny.randomise_factors(tiny_llama)
    theirs = in_peft(tiny_llama, tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    (group,) = lk.parameter_groups(tiny_llama, 1e-3)
    ours = trained_here(tiny_llama, torch.optim.AdamW([group], weight_decay=0.0))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    assert_close(ours, trained_there(theirs, optimizer, tmp_path / "end"))
    start = lk.Adapter.load(tmp_path / "start")
    assert moved(start, ours, "A") == 0
    assert moved(start, ours, "B") > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_fa_keeps_no_input_for_backward(dropout):
    """A linear too large for torch's own nodes keeps [N, r] and, with dropout, the packed mask; without LoRA-FA also
    its input, which a frozen base alone would not keep."""
    kept = {}
    for freeze in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(256, 256))
        lk.attach(model, lk.LoraConfig(rank=4, targets=["0"], freeze_a=freeze, dropout=dropout))
        x, sizes = torch.randn(512, 256, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(tuple(t.shape)) or t, lambda t: t
        ):
            model.train()(x).sum()
        kept[freeze] = sizes
    assert (512, 256) in kept[False]
    assert (512, 256) not in kept[True]
    assert (512, 4) in kept[True]


def test_lora_fa_is_refused_where_there_is_no_a_or_a_is_zero(tiny_llama, tiny_mlp):
    before = {n: p.requires_grad for n, p in tiny_mlp.named_parameters()}
    with pytest.raises(TargetError, match=r"'lin0' has an update without a factor A"):
        lk.attach(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"], variant="loha", freeze_a=True))
    assert {n: p.requires_grad for n, p in tiny_mlp.named_parameters()} == before
    with pytest.raises(TargetError, match="is an embedding, whose A starts at zero"):
        lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["embed_tokens"], freeze_a=True))


def test_kinds_without_a_penalty_add_nothing(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=TARGETS))
    before = lk.capture(tiny_llama).digest()
    assert float(lk.penalty(tiny_llama)) == 0
    lk.after_step(tiny_llama, 1, 10)
    assert lk.capture(tiny_llama).digest() == before
    with pytest.raises(StateError):
        lk.penalty(tiny.llama())


def test_lora_plus_of_dora_trains_the_magnitude_at_bs_rate_as_peft_does(tiny_llama, tmp_path):
    lk.attach(tiny_llama, lk.LoraConfig(rank=4, targets=TARGETS, variant="dora"))
    tiny.randomise_factors(tiny_llama)
    theirs = in_peft(tiny_llama, tmp_path / "start")
    ours = trained_here(tiny_llama, torch.optim.AdamW(lk.parameter_groups(tiny_llama, 1e-4, 8), weight_decay=0.0))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=8)
    assert_close(ours, trained_there(theirs, optimizer, tmp_path / "end"))
