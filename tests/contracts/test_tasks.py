"""What every task keeps: rows to items, one loss for training and evaluation, whatever rows share a batch; its adapter
loads in PEFT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_lm
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lorakit.bases.load import load_config
from lorakit.data.dataset import fingerprint
from lorakit.tasks import task_for, task_names, task_of
from lorakit.tasks.task import Base, weight_of
from lorakit.train.config import TrainConfig
from lorakit.train.memory import planner_for
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """`rows`: data to learn; `loss`: of one row, by other means than the task's; `base`: the base as PEFT's users load
    it, for a result.
    """

    rows: list[dict[str, Any]]
    loss: Callable[[Any, Any], torch.Tensor]
    base: Callable[[str, Path], Any]


def causal_loss(model: Any, item: Any) -> torch.Tensor:
    logits = model(torch.tensor([item.ids])).logits[0, :-1]
    targets = torch.tensor(item.ids[1:])
    return F.cross_entropy(logits, targets, reduction="none")[torch.tensor(item.trained[1:])].sum()


def label_loss(model: Any, item: Any) -> torch.Tensor:
    return -model(torch.tensor([item.ids])).logits[0].log_softmax(0)[item.label]


def classifier(base: str, result: Path) -> Any:
    names = json.loads((result / "lorakit.json").read_text())["data"]["labels"]
    torch.manual_seed(99)  # the head that PEFT replaces is another one in each process
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(names), id2label=dict(enumerate(names))
    )
    model.config.pad_token_id = tiny_lm.PAD
    return model


def labelled_rows() -> list[dict[str, Any]]:
    ends = {"good": "!", "bad": ".", "plain": "?"}
    return [
        {"text": f"{name} sees {what}{end}", "label": label}
        for name in tiny_lm.NAMES
        for label, end in ends.items()
        for what in ("tea", "the winding road")
    ]


KINDS = {
    "causal_lm": Kind(tiny_lm.rows(), causal_loss, lambda base, result: AutoModelForCausalLM.from_pretrained(base)),
    "classification": Kind(labelled_rows(), label_loss, classifier),
}


@pytest.fixture(params=task_names())
def name(request):
    return request.param


@pytest.fixture
def make(make_config, tmp_path, name):
    """`make(**changes)`: a short run's config for the task."""
    data = tiny_lm.write_rows(tmp_path / "own.jsonl", KINDS[name].rows)
    return partial(make_config, task=name, data=data)


def test_every_task_has_a_row_here():
    assert KINDS.keys() == set(task_names())


def test_a_runs_config_has_its_settings_and_takes_pefts_name_for_it(name):
    task = task_of(name)
    assert set(task.settings.model_fields) <= set(TrainConfig.model_fields)
    assert task_for(task.peft_type) == name
    config = TrainConfig(data="rows.jsonl", task=task.peft_type)
    assert config.task == name
    assert TrainConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


def test_items_say_what_they_cost_and_what_they_are(make, name):
    job = set_up(make())
    items = [*job.train, *job.held_out]
    assert len(items) == len(KINDS[name].rows)
    assert all(item.size >= 1 and item.weight >= 1 and "own.jsonl, row " in item.where for item in items)
    assert len({item.digest() for item in items}) == len(items)
    assert fingerprint(items) != fingerprint(items[::-1])
    assert not {item.split_key for item in job.train} & {item.split_key for item in job.held_out}


def test_the_loss_of_a_row_is_the_same_whatever_shares_its_batch_and_as_computed_by_hand(make, name):
    job = set_up(make())
    items = sorted(job.train, key=lambda item: item.size)[:: len(job.train) // 5]
    assert items[0].size < items[-1].size
    together = job.task.losses(job.model, job.task.collate(items, job.base))
    assert together.shape == (len(items),)
    assert together.dtype == torch.float32
    for item, loss in zip(items, together, strict=True):
        (alone,) = job.task.losses(job.model, job.task.collate([item], job.base))
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, KINDS[name].loss(job.model, item), rtol=1e-4, atol=1e-5)


def test_evaluation_has_the_loss_of_training_first(make):
    job = set_up(make())
    job.model.train()
    measured = job.task.evaluate(job.base, job.held_out, 3)
    losses = job.task.losses(job.model, job.task.collate(job.held_out, job.base))
    assert next(iter(measured)) == "loss"
    assert measured["loss"] == pytest.approx(float(losses.detach().sum()) / weight_of(job.held_out), rel=1e-5)
    assert job.model.training
    for batch_size in (1, 64):
        assert job.task.evaluate(job.base, job.held_out, batch_size) == pytest.approx(measured, rel=1e-4)


def test_a_batch_is_planned_as_it_is_made(make, name):
    config = make()
    job = set_up(config)
    made = job.task.collate(job.train[:2], job.base)
    planned = job.task.example(2, made["input_ids"].shape[1])
    assert {n: (t.shape, t.dtype) for n, t in planned.items()} == {n: (t.shape, t.dtype) for n, t in made.items()}
    estimate = planner_for(config, torch.float32, CPU, validation=2).estimate(2, 16)
    assert estimate.parts["activations"] > 0
    skeleton = job.task.skeleton(config, load_config(config.model), torch.float32)
    assert isinstance(job.model, type(skeleton))


def test_a_run_learns_and_is_the_same_to_the_last_bit_when_it_is_taken_up_again(make, name, tmp_path):
    config = make(
        out=tmp_path / "whole",
        steps=12,
        eval_every=3,
        save_every=3,
        keep=4,
        dropout=0.1,
        learning_rate=2e-2,
        patience=0,
    )
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    losses = [row["held_out_loss"] for row in whole.rows() if "held_out_loss" in row]
    assert losses[-1] < losses[0]
    assert all({"loss", task_of(name).unit} < row.keys() for row in whole.rows() if "loss" in row)
    shutil.copytree(whole.path, resumed.path)
    for step in (9, 12):
        shutil.rmtree(resumed.checkpoints / f"step-{step}")
    shutil.rmtree(resumed.adapter)
    train(config.replace(out=str(resumed.path)), QUIET)
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (whole.adapter / file).read_bytes() == (resumed.adapter / file).read_bytes()


def test_its_adapter_computes_the_same_in_peft(make, name):
    config = make(steps=4, learning_rate=2e-2, patience=0, eval_every=4)
    result = train(config, QUIET)
    job = set_up(config)
    ours = job.task.losses(job.model, job.task.collate(job.train[:6], job.base))
    assert job.config.method == "lora"
    theirs = peft.PeftModel.from_pretrained(KINDS[name].base(config.model, result.adapter), result.adapter).eval()
    found = torch.stack([KINDS[name].loss(theirs, item) for item in job.train[:6]])
    assert not torch.allclose(found, ours, atol=1e-3)  # a run that was just set up has not learnt
    Run(job, QUIET)  # takes it up where it ended
    ours = job.task.losses(job.model.eval(), job.task.collate(job.train[:6], job.base))
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["task_type"] == task_of(name).peft_type


def test_samples_are_texts_one_for_each_prompt(make):
    job = set_up(make(sample_tokens=3))
    prompts = job.task.prompts(job.config, job.base, job.data)
    answers = job.task.samples(job.config, job.base, prompts)
    assert [type(text) for text in answers] == [str] * len(prompts)
    assert isinstance(job.base, Base)
