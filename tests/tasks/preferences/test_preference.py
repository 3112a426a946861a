"""Runs on preferences: the same whatever shares a batch, also resumed, packed and with gradient checkpointing; what
the reference is.
"""

from __future__ import annotations

import json
import math
import shutil

import peft
import pytest
import tiny_lm
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from lorakit.errors import ConfigError, DataError, TrainError
from lorakit.tasks.preferences.losses import loss_names
from lorakit.tasks.preferences.reference import references_of
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)


def pairs():
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{'pears ' * (i % 3)}no apples"}
        for i, row in enumerate(tiny_lm.rows(16))
    ]


@pytest.fixture
def make(make_config, tmp_path):
    data = tiny_lm.write_rows(tmp_path / "pairs.jsonl", pairs())

    def made(**changes):
        given = {"task": "preference", "data": data, "steps": 4, "patience": 0, "learning_rate": 1e-2}
        given |= {"eval_every": 4, "sample_tokens": 0} | changes
        return make_config(**given)

    return made


def adapter(folder):
    return load_file(RunFolder(folder).adapter / "adapter_model.safetensors")


def logged(folder, name="loss"):
    return [row[name] for row in RunFolder(folder).rows() if name in row]


def answer_log_p(model, answer):
    """By transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([answer.ids])).logits[0, :-1]
    found = logits.log_softmax(-1)[range(answer.size - 1), answer.ids[1:]]
    return float(found[torch.tensor(answer.trained[1:])].sum())


def step(job, parts, packed=False):
    """The losses of these parts of a step, and the gradients of their sum."""
    job.model.zero_grad()
    losses = []
    for items in parts:
        own = job.task.losses(job.model, job.task.collate(items, job.base, packed))
        own.sum().backward()
        losses.append(own.detach())
    return torch.cat(losses), {n: p.grad.clone() for n, p in job.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("loss", loss_names())
def test_micro_batches_packing_and_checkpointing_do_not_change_a_step(make, loss):
    job = set_up(make(loss=loss))
    torch.manual_seed(0)
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    items = job.train[:6]
    if job.data.before_step is not None:
        job.data.before_step(job.base, items)
    job.model.train()
    first = step(job, [items])
    assert max(float(grad.abs().max()) for grad in first[1].values()) > 1e-3
    ways = [step(job, [[item] for item in items]), step(job, [items], True), step(job, [items[:4], items[4:]], True)]
    job.task.checkpoint(job.model)
    for losses, gradients in [*ways, step(job, [items])]:
        torch.testing.assert_close(losses, first[0], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, first[1][name], atol=1e-5, rtol=1e-4)


def sliding():
    """A model whose tokens attend to the 6 before them, less than a prompt's length."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tiny_lm.POSITIONS,
        initializer_range=0.2,
        sliding_window=6,
        pad_token_id=tiny_lm.PAD,
        eos_token_id=tiny_lm.EOS,
    )
    return MistralForCausalLM(config)


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_with_a_sliding_window_scores_each_answer_as_alone(make, tmp_path, packing):
    folder = tiny_lm.save(tmp_path / "sliding", sliding())
    job = set_up(make(model=folder, packing=packing))
    torch.manual_seed(0)
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    items = job.train[:5]
    job.task.checkpoint(job.model)
    job.model.train()
    losses, _ = step(job, [items], packing)
    job.model.eval()
    base = MistralForCausalLM.from_pretrained(folder).eval()
    for item, loss, reference in zip(items, losses, references_of(job.base, items), strict=True):
        own = [answer_log_p(job.model, answer) for answer in item.answers]
        assert reference == pytest.approx([answer_log_p(base, answer) for answer in item.answers], abs=1e-4)
        margin = torch.tensor(0.1 * ((own[0] - reference[0]) - (own[1] - reference[1])))
        assert float(loss) == pytest.approx(-float(torch.nn.functional.logsigmoid(margin)), abs=1e-5)


def test_the_micro_batches_of_a_kto_run_share_the_steps_divergence(make, tmp_path):
    for rows in (1, 4):
        train(make(out=tmp_path / f"{rows}", loss="kto", micro_batch=rows, learning_rate=3e-2), QUIET)
    for name in ("loss", "reward_chosen", "kl"):
        assert logged(tmp_path / "1", name) == pytest.approx(logged(tmp_path / "4", name), abs=1e-4)


def test_a_kto_run_is_the_same_to_the_last_bit_when_it_is_resumed(make, tmp_path):
    config = make(out=tmp_path / "whole", loss="kto", steps=6, save_every=3, keep=2, dropout=0.1)
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-6")
    shutil.rmtree(resumed.adapter)
    train(config.replace(out=str(resumed.path)), QUIET)
    assert (whole.adapter / "adapter_model.safetensors").read_bytes() == (
        resumed.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_the_reference_of_a_run_from_an_adapter_is_that_adapter_as_it_was(make, make_config, tmp_path):
    earlier = train(make_config(out=tmp_path / "first", learning_rate=2e-2), QUIET).adapter
    config = make(out=tmp_path / "second", loss="kto", adapter=str(earlier), save_every=2, keep=2)
    job = set_up(config)
    alone = AutoModelForCausalLM.from_pretrained(config.model)
    with_adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), earlier)
    for item, own in zip(job.train[:3], references_of(job.base, job.train), strict=False):
        rows = [*item.answers, *([item.mismatched] if item.mismatched else [])]
        assert own == pytest.approx([answer_log_p(with_adapter, row) for row in rows], abs=1e-4)
        assert own != pytest.approx([answer_log_p(alone, row) for row in rows], abs=1e-1)
    train(config, QUIET)
    assert logged(tmp_path / "second")[0] == pytest.approx(0.5, abs=1e-5)
    whole, resumed = RunFolder(tmp_path / "second"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.adapter)
    (resumed.path / "reference.safetensors").unlink()  # it is made again from the earlier adapter
    train(config.replace(out=str(resumed.path)), QUIET)
    for name in ("adapter/adapter_model.safetensors", "reference.safetensors"):
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes()


def test_full_fine_tuning_keeps_the_base_it_began_with_as_its_reference(make, tmp_path):
    config = make(out=tmp_path / "full", method="full", learning_rate=1e-3, save_every=2, keep=2)
    train(config, QUIET)
    assert logged(tmp_path / "full")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(tmp_path / "full")[-1] < 0.6
    whole, resumed = RunFolder(tmp_path / "full"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.model)
    train(config.replace(out=str(resumed.path)), QUIET)
    name = "model/model.safetensors"
    assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes()


def test_a_resumed_run_reads_its_reference_and_names_a_damaged_one(make, tmp_path):
    config = make(save_every=2, keep=2)
    train(config, QUIET)
    folder = RunFolder(config.out)
    shutil.rmtree(folder.checkpoints / "step-4")
    kept = folder.path / "reference.safetensors"
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(TrainError, match=r"reference.safetensors is damaged[\s\S]*remove it"):
        set_up(config)


def test_a_reference_of_another_run_in_the_folder_is_not_used(make, tmp_path):
    config = make(out=tmp_path / "run")
    first = set_up(config)
    kept = RunFolder(config.out).path / "reference.safetensors"
    values = load_file(kept)["values"].clone()  # else it is a view of the file
    kept.write_bytes(b"of another run")
    again = set_up(config)
    assert references_of(again.base, again.train) == references_of(first.base, first.train)
    torch.testing.assert_close(load_file(kept)["values"], values, atol=0, rtol=0)


def test_the_runs_of_a_sweep_are_what_they_would_be_alone(make, tmp_path):
    config = make(out=tmp_path / "sweep", loss="kto", micro_batch="auto")
    plan = expand(config.model_dump(exclude_unset=True) | {"beta": [0.1, 0.5]})
    sweep(plan, SweepProgress(quiet=True))
    for number, run in enumerate(plan.runs.values()):
        alone = run.replace(out=str(tmp_path / f"{number}"))
        train(alone, QUIET)
        assert logged(run.out) == pytest.approx(logged(alone.out), abs=2e-5)
        for key, tensor in adapter(run.out).items():
            torch.testing.assert_close(tensor, adapter(alone.out)[key], atol=1e-5, rtol=0)
    assert len(plan.runs) == 2


def test_kto_estimates_the_divergence_over_the_step_and_evaluation_over_all_rows(make):
    job = set_up(make(loss="kto"))
    torch.manual_seed(0)
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    ratios = [
        answer_log_p(job.model, item.mismatched) - values[-1]
        for item, values in zip(job.train, references_of(job.base, job.train), strict=True)
    ]
    for items in (job.train[:3], job.train):
        job.data.before_step(job.base, items)
        expected = max(0.0, sum(ratios[: len(items)]) / len(items))
        assert float(job.task.collate(items, job.base)["kl"]) == pytest.approx(expected, abs=1e-4)
    measured = job.task.evaluate(job.base, job.train[:3], 2)
    assert measured["kl"] == pytest.approx(max(0.0, sum(ratios[:3]) / 3), abs=1e-4)
    assert float(job.task.collate(job.train, job.base)["kl"]) == pytest.approx(expected, abs=1e-4)  # still the step's
    assert measured["reward_margin"] == pytest.approx(measured["reward_chosen"] - measured["reward_rejected"])


def test_rewards_are_logged_at_each_step_and_evaluation(make, tmp_path):
    train(make(out=tmp_path / "run"), QUIET)
    rows = RunFolder(tmp_path / "run").rows()
    names = {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"}
    steps = [row for row in rows if "loss" in row]
    assert all(names <= row.keys() for row in steps)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["reward_margin"] > 0.05
    held_out = [row for row in rows if "held_out_loss" in row]
    assert all({f"held_out_{name}" for name in (*names, "likelihood_accuracy")} <= row.keys() for row in held_out)
    train(make(out=tmp_path / "kto", loss="kto"), QUIET)
    last = [row for row in RunFolder(tmp_path / "kto").rows() if "held_out_loss" in row][-1]
    assert {"held_out_kl", "held_out_reward_margin"} <= last.keys()


def test_a_result_says_which_loss_it_was_trained_with(make):
    result = train(make(loss="simpo", beta=1.5, steps=1), QUIET)
    about = json.loads((result.adapter / "lorakit.json").read_text())["data"]
    assert about["preference"] == {"loss": "simpo", "beta": 1.5, "simpo_gamma": 1.0}
    assert json.loads((result.adapter / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_what_the_task_does_not_have_is_refused(make, make_config, tmp_path):
    for setting, value in (("train_on", "all"), ("turns", "last"), ("answer_after", "A:")):
        with pytest.raises(ConfigError, match=f"{setting}: task: preference does not have it"):
            set_up(make(**{setting: value}))
    with pytest.raises(ConfigError, match=r"orpo_lambda: 1.0: loss: auto does not have it"):
        set_up(make(orpo_lambda=1.0))
    with pytest.raises(DataError, match=r"preference pairs[\s\S]*--task preference"):
        set_up(make(task="causal_lm"))
    labelled = [{"prompt": f"{name}\n", "completion": "yes", "label": True} for name in tiny_lm.NAMES]
    data = tiny_lm.write_rows(tmp_path / "labelled.jsonl", labelled)
    with pytest.raises(DataError, match="this loss compares two answers"):
        set_up(make(data=data, loss="dpo"))
    job = set_up(make(data=data, out=tmp_path / "labelled"))
    assert dict(job.data.facts)["answers"].startswith("10 desirable, 0 undesirable: with one kind only")


def test_unbalanced_labels_are_shown_with_the_weight_that_balances_them(make, tmp_path):
    rows = [{"prompt": f"{name}\n", "completion": "yes", "label": i % 4 == 0} for i, name in enumerate(tiny_lm.NAMES)]
    data = tiny_lm.write_rows(tmp_path / "labelled.jsonl", rows)
    facts = dict(set_up(make(data=data, validation=0)).data.facts)
    assert facts["answers"] == "3 desirable, 9 undesirable; desirable_weight: 3 would balance them"
    facts = dict(set_up(make(data=data, validation=0, desirable_weight=3.0, out=tmp_path / "other")).data.facts)
    assert facts["answers"] == "3 desirable, 9 undesirable"
