"""AdaLoRA in training, with the real PEFT as the judge: its penalty, its importances, and the ranks that it keeps."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import ConfigError, TargetError
from lorakit.layers.updates.adalora import AdaLoraFactors, Budget

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS, STEPS = ["q_proj", "down_proj"], 12
SETTINGS = {
    "variant": "adalora",
    "rank": 6,
    "alpha": 12.0,
    "targets": TARGETS,
    "adalora_rank": 3,
    "adalora_warmup": 2 / STEPS,
    "adalora_final": 3 / STEPS,
}


def loss_of(model, seed: int):
    ids = torch.randint(1, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def updates_of(model) -> dict[str, AdaLoraFactors]:
    return {n.removesuffix(".lora_default"): m for n, m in model.named_modules() if isinstance(m, AdaLoraFactors)}


def in_peft(model, every: int = 1):
    """PEFT's model with the same base, settings and first factors."""
    config = peft.AdaLoraConfig(
        target_modules=TARGETS,
        init_r=6,
        target_r=3,
        lora_alpha=12,
        tinit=2,
        tfinal=3,
        deltaT=every,
        total_step=STEPS,
        orth_reg_weight=0.5,
        task_type="CAUSAL_LM",  # without it PEFT 0.21 adds no penalty
    )
    theirs = peft.get_peft_model(tiny.llama(), config)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_E")}
    with torch.no_grad():
        for name, update in updates_of(model).items():
            for factor in "AEB":
                getattr(layers[name], f"lora_{factor}")["default"].copy_(getattr(update, factor))
    return theirs, layers


def trained(model, optimizer, step: int) -> float:
    loss = loss_of(model, step) + lk.penalty(model)
    loss.backward()
    optimizer.step()
    lk.after_step(model, step, STEPS)
    optimizer.zero_grad()
    return float(loss)


@pytest.mark.parametrize("every", [1, 3])
def test_losses_importances_and_kept_ranks_are_pefts(tiny_llama, every):
    torch.manual_seed(0)
    lk.attach(tiny_llama, lk.LoraConfig(**SETTINGS, adalora_every=every))
    theirs, layers = in_peft(tiny_llama, every)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
        for model in (tiny_llama, theirs)
    ]
    updates, numbers = updates_of(tiny_llama), []
    for step in range(1, STEPS + 1):
        ours = trained(tiny_llama, optimizers[0], step)
        loss = loss_of(theirs, step)
        loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[1].zero_grad()
        assert ours == pytest.approx(float(loss), rel=1e-4)
        averages = theirs.base_model.rankallocator
        for name, update in updates.items():
            assert ((update.E != 0) == (layers[name].lora_E["default"] != 0)).all(), (step, name)
            torch.testing.assert_close(update.A, layers[name].lora_A["default"], rtol=1e-3, atol=1e-5)
            if step < STEPS - 3:
                key = f"{name}.lora_A.default"
                for own, there in (("sensitivity", averages.exp_avg_ipt), ("uncertainty", averages.exp_avg_unc)):
                    torch.testing.assert_close(update.get_buffer(f"{own}_A"), there[key], rtol=1e-2, atol=1e-8)
        numbers.append(sum(int((update.E != 0).sum()) for update in updates.values()))
    assert numbers[1] == 24  # warm-up
    assert numbers[-1] == numbers[STEPS - 4] == 12  # the final budget, kept to the end
    assert numbers[2:-3] == sorted(numbers[2:-3], reverse=True) or every > 1
    assert len({int((update.E != 0).sum()) for update in updates.values()}) > 1  # the modules' ranks differ


def test_captured_it_is_the_lora_of_the_kept_ranks_and_loads_in_peft(tiny_llama, tmp_path):
    torch.manual_seed(0)
    lk.attach(tiny_llama, lk.LoraConfig(**SETTINGS))
    optimizer = torch.optim.AdamW(lk.parameter_groups(tiny_llama, 2e-2))
    for step in range(1, STEPS + 1):
        trained(tiny_llama, optimizer, step)
    adapter = lk.capture(tiny_llama)
    assert (adapter.config.variant, adapter.config.adalora_rank) == ("lora", None)
    kept = {name: max(1, int((update.E != 0).sum())) for name, update in updates_of(tiny_llama).items()}
    assert {module: f.rank for module, f in adapter.factors.items()} == kept
    assert len(set(kept.values())) > 1
    ours = tiny.logits(tiny_llama)
    again = lk.attach(tiny.llama(), lk.Adapter.load(adapter.save(tmp_path)))
    torch.testing.assert_close(tiny.logits(again), ours, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(theirs), ours, rtol=1e-5, atol=1e-5)


def test_a_module_that_lost_all_ranks_is_an_update_that_changes_nothing(tiny_mlp):
    lk.attach(tiny_mlp, lk.LoraConfig(**SETTINGS | {"targets": ["lin0", "lin1"]}))
    lin0, lin1 = updates_of(tiny_mlp).values()
    assert {f.rank for f in lk.capture(tiny_mlp).factors.values()} == {6}  # new: nothing is cut
    with torch.no_grad():
        lin0.kept.fill_(False)
        lin1.E.fill_(1.0)
    adapter = lk.capture(tiny_mlp)
    assert {m: f.rank for m, f in adapter.factors.items()} == {"lin0": 1, "lin1": 6}
    assert adapter.updates["lin0"].is_zero()


@pytest.mark.parametrize("rslora", [False, True])
def test_cutting_ranks_keeps_the_scale(tiny_mlp, rslora):
    lk.attach(tiny_mlp, lk.LoraConfig(**SETTINGS | {"targets": ["lin0"]}, rslora=rslora))
    (update,) = updates_of(tiny_mlp).values()
    tiny.randomise_factors(tiny_mlp)
    with torch.no_grad():
        update.E[[0, 3]] = 0
        expected = update.scale * update.B @ torch.diag(update.E.flatten()) @ update.A
    value = lk.capture(tiny_mlp).updates["lin0"]
    assert value.rank == 4
    torch.testing.assert_close(value.matrix(), expected)


def test_the_budget_falls_with_the_cube_of_the_time_left():
    budget = Budget(first=100, last=20, warmup=0.1, final=0.5, every=1)
    found = [budget.at(step, 100) for step in range(1, 101)]
    assert found[:10] == [None] * 10
    assert found[10] == int(80 * (1 - 1 / 40) ** 3 + 20)
    assert found[29] == 20 + 80 / 8  # half of the way
    assert found[49] == 20
    assert found[50:] == [None] * 50
    assert [step for step in range(1, 101) if Budget(100, 20, 0.1, 0.5, 7).at(step, 100)] == [
        14,
        21,
        28,
        35,
        42,
        49,
        50,
    ]
    for steps in (1, 2, 3):  # always settled within the run
        assert budget.at(budget.settled(steps), steps) == 20


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_very_short_run_still_ends_with_the_final_budget(tiny_llama, steps):
    lk.attach(tiny_llama, lk.LoraConfig(**SETTINGS))
    optimizer = torch.optim.AdamW(lk.parameter_groups(tiny_llama, 2e-2))
    for step in range(1, steps + 1):
        (loss_of(tiny_llama, step) + lk.penalty(tiny_llama)).backward()
        optimizer.step()
        lk.after_step(tiny_llama, step, steps)
        optimizer.zero_grad()
    assert sum(int((update.E != 0).sum()) for update in updates_of(tiny_llama).values()) == 12


def test_the_penalty_is_of_all_adapted_modules_and_can_be_left_out(tiny_cnn):
    """Also of kernels, as matrices of rank r, and of modules of several ranks."""
    lk.attach(
        tiny_cnn,
        lk.LoraConfig(variant="adalora", rank=3, targets=["conv1", "conv2", "head"], rank_pattern={"conv1": 2}),
    )
    updates = list(updates_of(tiny_cnn).values())
    assert len({update.rank for update in updates}) == 2
    norms = []
    for update in updates:
        A, B = update.A.double().flatten(1), update.B.double().flatten(1)
        norms += [(A @ A.T - torch.eye(len(A))).norm(), (B.T @ B - torch.eye(len(A))).norm()]
    torch.testing.assert_close(lk.penalty(tiny_cnn).double(), 0.5 * torch.stack(norms).mean(), rtol=1e-5, atol=1e-6)
    lk.detach(tiny_cnn)
    lk.attach(
        tiny_cnn, lk.LoraConfig(variant="adalora", rank=3, targets=["conv1", "conv2", "head"], adalora_penalty=0.0)
    )
    assert not lk.penalty(tiny_cnn).requires_grad


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"targets": ["embed_tokens"]}, TargetError, "'model.embed_tokens' is an embedding"),
        ({"init": "gaussian"}, TargetError, "init='gaussian' has no effect on AdaLoRA"),
        ({"freeze_a": True}, TargetError, "omit freeze_a"),
        ({"packed": {"q_proj": [True, False]}}, TargetError, "packed"),
        ({"adalora_rank": 7}, ConfigError, r"adalora_rank \(7\) .* higher than rank \(6\)"),
        ({"adalora_warmup": 0.5, "adalora_final": 0.5}, ConfigError, "leave no steps to reduce ranks in"),
        ({"variant": "lora"}, ConfigError, "adalora_rank has an effect with variant='adalora' only"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tiny_llama, settings, error, message):
    before = tiny.logits(tiny_llama)
    with pytest.raises(error, match=message):
        lk.attach(tiny_llama, lk.LoraConfig(**SETTINGS | settings))
    assert torch.equal(tiny.logits(tiny_llama), before)
