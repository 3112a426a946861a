"""Our preference losses are TRL's: the same rows of tokens, values and gradients, on one model with one adapter.

TRL computes with its own trainers, their own tokenization and collation, and the base as a model of its own for the
reference. Where the two differ on purpose, a test says so.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_lm
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import lorakit as lk
from lorakit.data.batches import collate
from lorakit.tasks import task_of
from lorakit.tasks.task import weight_of
from lorakit.tasks.text.causal_loss import row_losses
from lorakit.train.setup import set_up

TASK = task_of("preference")
ATOL = 1e-5
# Answers of unequal lengths, but chosen ones that are all 9 bytes long.
PAIRS = [
    {"prompt": f"{name}: {i}\n", "chosen": f"{i} apples.", "rejected": f"{'very ' * i}many pears"}
    for i, name in enumerate(tiny_lm.NAMES[:5])
]
UNEQUAL = [row | {"chosen": row["chosen"] + "!" * (2 * i)} for i, row in enumerate(PAIRS)]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(UNEQUAL)
]


@pytest.fixture
def job(make_config, tmp_path):
    """`job(rows, **settings)`: a run whose adapter has moved away from the base, and all its rows as one batch."""

    def made(rows: list[dict[str, Any]], **settings: Any) -> Any:
        data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
        job = set_up(make_config(task="preference", data=data, validation=0, max_length=96, **settings))
        torch.manual_seed(1)
        for parameter in trained(job.model).values():
            parameter.data.normal_(std=0.1)
        return job

    return made


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = trained(model)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def ours(job: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    """The mean loss of all rows, its gradients, and the batch."""
    job.model.train()
    if job.data.before_step is not None:
        job.data.before_step(job.base, job.train)
    batch = TASK.collate(job.train, job.base)
    loss = TASK.losses(job.model, batch).sum() / weight_of(job.train)
    return loss, gradients(job.model, loss), batch


def trainer(kind: Any, config: Any, job: Any, rows: list[dict[str, Any]], tmp_path: Any, **settings: Any) -> Any:
    """TRL's trainer on a copy of the run's model, with all rows as one batch."""
    policy = copy.deepcopy(job.model).train()
    given = {}
    if kind in (DPOTrainer, KTOTrainer):
        given["ref_model"] = lk.detach(copy.deepcopy(job.model))
    arguments = config(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(rows),
        max_length=96,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        **settings,
    )
    return kind(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_lm.tokenizer(),
        **given,
    )


def batch_of(made: Any) -> Any:
    return made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))])


def check(job: Any, model: Any, theirs: torch.Tensor) -> None:
    """Assert that value and gradients are ours."""
    loss, own, _ = ours(job)
    torch.testing.assert_close(loss, theirs, atol=ATOL, rtol=0)
    others = gradients(model, theirs)
    assert own.keys() == others.keys()
    assert max(float(grad.abs().max()) for grad in own.values()) > 1e-3
    for name, grad in own.items():
        torch.testing.assert_close(grad, others[name], atol=ATOL, rtol=0)


def check_tokens(job: Any, ids: torch.Tensor, attention: torch.Tensor, answers: torch.Tensor) -> None:
    """Assert that the rows of tokens and their masks are ours: first all chosen ones, then the rejected."""
    items = [item.answers for item in job.train]
    own = [answer for answers in zip(*items) for answer in answers]
    assert [row[mask.bool()].tolist() for row, mask in zip(ids, attention)] == [answer.ids for answer in own]
    assert [row[mask.bool()].bool().tolist() for row, mask in zip(answers, attention)] == [a.trained for a in own]


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"loss": "dpo", "beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
        ({"loss": "ipo", "beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    ],
)
def test_dpo_and_ipo_are_those_of_dpo_trainer(job, tmp_path, settings, theirs):
    run = job(UNEQUAL, **settings)
    made = trainer(DPOTrainer, DPOConfig, run, UNEQUAL, tmp_path, **theirs)
    batch = batch_of(made)
    check_tokens(run, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    check(run, made.model, made.compute_loss(made.model, batch))


def test_the_logged_rewards_are_those_of_dpo_trainer(job, tmp_path):
    run = job(UNEQUAL, loss="dpo", beta=0.3)
    made = trainer(DPOTrainer, DPOConfig, run, UNEQUAL, tmp_path, loss_type=["sigmoid"], beta=0.3)
    made.compute_loss(made.model, batch_of(made))
    _, _, batch = ours(run)
    names = {"reward_chosen": "chosen", "reward_rejected": "rejected", "reward_margin": "margins"}
    for own, their in (names | {"reward_accuracy": "accuracies"}).items():
        expected = made._metrics["train"][f"rewards/{their}"][-1]
        assert float(batch["logged"][own].mean()) == pytest.approx(expected, abs=ATOL)


def test_a_supervised_term_is_trls_where_chosen_answers_are_equally_long(job, tmp_path):
    """Ours is the mean of the pairs' means (RPO's equation 2), TRL's the mean over all tokens of a batch."""
    run = job(PAIRS, loss="dpo", beta=0.3, sft_weight=0.7)
    made = trainer(
        DPOTrainer, DPOConfig, run, PAIRS, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.3
    )
    check(run, made.model, made.compute_loss(made.model, batch_of(made)))


def test_kto_is_that_of_kto_trainer_with_its_mismatched_rows(job, tmp_path):
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.3}
    run = job(LABELLED, **weights)
    made = trainer(KTOTrainer, KTOConfig, run, LABELLED, tmp_path, **weights)
    batch = batch_of(made)
    check_tokens(run, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    mismatched = [row[mask.bool()].tolist() for row, mask in zip(batch["KL_input_ids"], batch["KL_attention_mask"])]
    assert mismatched == [item.mismatched.ids for item in run.train]
    check(run, made.model, made.compute_loss(made.model, batch))
    assert made._metrics["train"]["kl"][-1] == pytest.approx(float(ours(run)[2]["kl"]), abs=ATOL)


def test_kto_with_a_divergence_above_zero_is_that_of_kto_trainer(job, tmp_path):
    run = job(LABELLED, beta=0.3)
    optimizer = torch.optim.SGD(trained(run.model).values(), lr=0.1)
    for _ in range(3):  # make the mismatched rows likelier than they are to the base
        rows = [item.mismatched for item in run.train]
        row_losses(run.model, collate(rows, tiny_lm.PAD)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    made = trainer(KTOTrainer, KTOConfig, run, LABELLED, tmp_path, beta=0.3)
    check(run, made.model, made.compute_loss(made.model, batch_of(made)))
    divergence = made._metrics["train"]["kl"][-1]
    assert divergence > 0.1
    assert divergence == pytest.approx(float(ours(run)[2]["kl"]), abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_that_of_cpo_trainer(job, tmp_path, smoothing):
    run = job(UNEQUAL, loss="simpo", beta=1.5, simpo_gamma=0.4, label_smoothing=smoothing)
    theirs = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": smoothing}
    made = trainer(CPOTrainer, CPOConfig, run, UNEQUAL, tmp_path, **theirs)
    check(run, made.model, made.compute_loss(made.model, batch_of(made)))


def test_simpo_with_a_supervised_term_is_cpo_simpo(job, tmp_path):
    run = job(PAIRS, loss="simpo", beta=1.5, simpo_gamma=0.4, sft_weight=1.0)
    theirs = {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 1.5, "simpo_gamma": 0.4}
    made = trainer(CPOTrainer, CPOConfig, run, PAIRS, tmp_path, **theirs)
    check(run, made.model, made.compute_loss(made.model, batch_of(made)))


def test_orpo_is_that_of_orpo_trainer_but_for_the_prompt_in_its_supervised_term(job, tmp_path):
    """TRL's supervised term is over the prompt too, and over all tokens of a batch. Ours is over the answer's tokens,
    the mean of each, as in the paper (equation 2). In its place TRL's comes out the same.
    """
    run = job(UNEQUAL, loss="orpo", orpo_lambda=0.4)
    made = trainer(ORPOTrainer, ORPOConfig, run, UNEQUAL, tmp_path, beta=0.4)
    chosen, rejected, _, _, theirs_nll = made.concatenated_forward(made.model, batch_of(made))
    total, _ = made.get_batch_loss_metrics(made.model, batch_of(made))
    torch.testing.assert_close(total, theirs_nll - made.odds_ratio_loss(chosen, rejected)[0].mean())
    check(run, made.model, -chosen.mean() - made.odds_ratio_loss(chosen, rejected)[0].mean())
