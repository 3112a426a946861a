"""Answers to fixed prompts during training: base beside tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_lm
import torch

import lorakit as lk
from lorakit.bases.load import load_model, load_tokenizer
from lorakit.errors import DataError
from lorakit.generate.generate import generate
from lorakit.tasks import causal_lm
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


def test_base_and_tuned_answers_are_written_at_each_evaluation(make_config):
    config = make_config(steps=5, eval_every=2, patience=0, learning_rate=2e-2, validation=0.2, sample_tokens=6)
    result = train(config, QUIET)
    job = set_up(config)
    folder = RunFolder(config.out)
    assert [step for step, _ in folder.sampled()] == [2, 4, 5]
    told = [json.loads(path.read_text()) for _, path in folder.sampled()]
    assert all(len(rows) == 2 and set(row) == {"prompt", "base", "tuned"} for rows in told for row in rows)
    assert len({row["base"] for rows in told for row in rows[:1]}) == 1  # the base does not change
    model, tokenizer = load_model(config.model, torch.float32, torch.device("cpu")), load_tokenizer(config.model)
    prompts = [job.base.processor(row["prompt"]).input_ids for row in told[-1]]
    assert [row["base"] for row in told[-1]] == generate(model, tokenizer, prompts, max_new_tokens=6)
    assert result.best_step == 5  # so that the saved adapter is the one that answered last
    lk.attach(model, lk.Adapter.load(result.adapter))
    assert [row["tuned"] for row in told[-1]] == generate(model, tokenizer, prompts, max_new_tokens=6)
    assert told[-1][0]["tuned"] != told[-1][0]["base"]


def test_the_default_prompts_are_held_out_ones_all_different(make_config):
    job = set_up(make_config())
    prompts = causal_lm.prompts(job.config, job.base, job.data)
    held_out = [item.row.values["prompt"] for item in job.held_out]
    assert [p.text for p in prompts] == held_out[:2]
    same = causal_lm.prompts(job.config, job.base, replace(job.data, held_out=[job.held_out[0]] * 5))
    assert len(same) == 1


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over(make_config):
    job = set_up(make_config(sample_tokens=20))
    long, short = tiny_lm.item(range(2, 92), 80, 1), tiny_lm.item(range(2, 50), 40, 2)
    prompts = causal_lm.prompts(job.config, job.base, replace(job.data, held_out=[long, short]))
    assert [len(p.ids) for p in prompts] == [40]


def test_configured_prompts_are_answered_and_too_long_ones_refused(make_config):
    job = set_up(make_config(sample_prompts=["Ada: 3\n", "Bo, and Cy"]))
    prompts = causal_lm.prompts(job.config, job.base, job.data)
    assert [p.text for p in prompts] == ["Ada: 3\n", "Bo, and Cy"]
    assert prompts[0].ids == job.base.processor("Ada: 3\n").input_ids
    with pytest.raises(DataError, match=r"sample prompt 'xxx"):
        causal_lm.prompts(job.config.replace(sample_prompts=["x" * 95]), job.base, job.data)


@pytest.mark.parametrize(
    ("style", "text"),
    [("chat", "<user>hi<assistant>"), ("plain", "### Instruction:\nhi\n\n### Response:\n"), ("none", "hi")],
)
def test_a_configured_prompt_is_written_as_the_data_is(make_config, tmp_path, style, text):
    folder = tiny_lm.save(tmp_path / "chat", chat_template=tiny_lm.CHATML)
    config = make_config(model=folder, sample_prompts=["hi"], sample_tokens=4)
    job = set_up(config)
    (prompt,) = causal_lm.prompts(config, job.base, replace(job.data, about={"template": style}))
    assert job.base.processor.decode(prompt.ids) == text


@pytest.mark.parametrize("changes", [{"sample_tokens": 0}, {"method": "full"}, {"validation": 0}])
def test_no_samples_are_taken_where_none_are_wanted_or_possible(make_config, changes):
    config = make_config(steps=2, **changes)
    train(config, QUIET)
    assert RunFolder(config.out).sampled() == []


def test_sampling_leaves_the_adapter_active_and_training_as_it_was(make_config):
    job = set_up(make_config())
    job.model.train()
    prompts = causal_lm.prompts(job.config, job.base, job.data)
    with job.method.base_alone(job.model):
        assert lk.active(job.model) == {}
        causal_lm.samples(job.config, job.base, prompts)
    assert lk.active(job.model) == {"default": 1.0}
    assert all(module.training for module in job.model.modules())
