"""TRL's trainers compute the same with `reference` as with the second model that they load, to the last digit."""

from __future__ import annotations

import pytest
import tiny_lm
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip(
    "trl", minversion="1.16", reason="written for TRL 1.16, whose modules have moved since older releases"
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

import lorakit as lk
from lorakit.errors import StateError
from lorakit.integrations import adapter_trainer, reference

BETA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("base"))


def adapted(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    return lk.attach(model, lk.LoraConfig(rank=4)), AutoTokenizer.from_pretrained(folder)


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | more


def pairs() -> Dataset:
    rows = tiny_lm.rows(16)
    return Dataset.from_list(
        [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for a, b in zip(rows, rows[3:] + rows[:3], strict=True)
        ]
    )


def logged(trainer, *names) -> list[tuple[float, ...]]:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    return [tuple(row[name] for name in names) for row in rows]


def distinct(*models) -> int:
    parameters = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
    return sum(parameters.values())


def dpo(folder, out, shared: bool, **more) -> DPOTrainer:
    model, tokenizer = adapted(folder)
    trainer = DPOTrainer(
        model,
        ref_model=reference(model) if shared else None,
        args=DPOConfig(**settings(out, beta=BETA, **more)),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_dpos_losses_are_those_with_trls_own_copy_and_half_the_parameters(more, folder, tmp_path):
    ours, theirs = dpo(folder, tmp_path / "a", True, **more), dpo(folder, tmp_path / "b", False, **more)
    names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    assert logged(ours, *names) == logged(theirs, *names)
    assert logged(ours, "rewards/margins")[-1][0] != 0
    assert lk.capture(ours.model).digest() == lk.capture(theirs.model).digest()
    base, adapter = distinct(AutoModelForCausalLM.from_pretrained(folder)), lk.capture(ours.model).parameters
    assert distinct(ours.model, ours.ref_model) == base + adapter
    if theirs.ref_model is not None:
        assert distinct(theirs.model, theirs.ref_model) == 2 * base + adapter


def test_gradient_checkpointing_which_is_trls_default_changes_nothing(folder, tmp_path):
    plain = dpo(folder, tmp_path / "a", True, gradient_checkpointing=False)
    checkpointed = dpo(folder, tmp_path / "b", True, gradient_checkpointing=True)
    names = ("loss", "rewards/margins", "grad_norm")
    for a, b in zip(logged(plain, *names), logged(checkpointed, *names), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_dpo_continues_from_a_frozen_copy_of_the_adapter(folder, tmp_path):
    model, tokenizer = adapted(folder)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02)
    lk.attach(model, lk.capture(model), "start", activate=False)
    trainer = DPOTrainer(
        model,
        ref_model=reference(model, "start"),
        args=DPOConfig(**settings(tmp_path, beta=BETA)),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    adapter_trainer(trainer).train()
    (first,), *_, (last,) = logged(trainer, "rewards/margins")
    assert first == pytest.approx(0, abs=1e-5)  # TRL computes the trained model's logits in tiles
    assert abs(last) > 1e-3


def words(completions, **_):
    return [float(sum(map(ord, c)) % 7) for c in completions]


GROUPS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 4, "max_completion_length": 6}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 4, "max_completion_length": 6}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_kl_of_grpo_and_rloo_is_that_with_trls_own_copy(name, folder, tmp_path):
    cls, config, more = GROUPS[name]
    outcomes = []
    for shared in (True, False):
        model, tokenizer = adapted(folder)
        base = reference(model)
        args = config(**settings(tmp_path / str(shared), beta=0.0 if shared else BETA, **more))
        trainer = cls(
            model,
            reward_funcs=words,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in tiny_lm.rows(8)]),
            processing_class=tokenizer,
        )
        if shared:
            trainer.beta = args.beta = BETA
            add_fused_lm_head(base, temperature=trainer.temperature)
            trainer.ref_model = trainer.accelerator.prepare_model(base, evaluation_mode=True)
        trainer.train()
        outcomes.append(
            (logged(trainer, "loss", "kl", "reward"), lk.capture(model).digest(), distinct(model, trainer.ref_model))
        )
    ours, theirs = outcomes
    assert ours[:2] == theirs[:2]
    assert ours[0][-1][1] > 0
    assert ours[2] < 0.6 * theirs[2]


def test_a_reference_that_is_mixed_into_the_model_is_refused(folder, tmp_path):
    model, tokenizer = adapted(folder)
    trainer = DPOTrainer(
        model,
        ref_model=reference(model),
        args=DPOConfig(**settings(tmp_path, sync_ref_model=True)),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    with pytest.raises(StateError, match="sync_ref_model=True writes"):
        adapter_trainer(trainer)


def test_a_resumed_dpo_run_is_the_uninterrupted_one(folder, tmp_path):
    def trainer(out):
        model, tokenizer = adapted(folder)
        made = DPOTrainer(
            model,
            ref_model=reference(model),
            args=DPOConfig(**settings(tmp_path / out, save_strategy="steps", save_steps=2)),
            train_dataset=pairs(),
            processing_class=tokenizer,
        )
        return adapter_trainer(made)

    whole, again = trainer("a"), trainer("b")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert lk.capture(again.model).digest() == lk.capture(whole.model).digest()
    assert not (tmp_path / "a" / "checkpoint-2" / "model.safetensors").exists()
