"""A run starts from an earlier adapter: its values first, what it fixes, what contradicts it, and its lineage."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import tiny_lm
import torch
import yaml
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.errors import AdapterError, ConfigError
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.start import resolved
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory, model_folder, data_file):
    """The result of a run of rank 3 on two modules."""
    out = tmp_path_factory.mktemp("first") / "run"
    config = tiny_lm.config(
        model_folder,
        data_file,
        out,
        rank=3,
        alpha=7.0,
        targets=["q_proj", "down_proj"],
        learning_rate=3e-2,
        dropout=0.1,
    )
    return train(config, QUIET).adapter


@pytest.fixture
def others(tmp_path):
    rows = [{"prompt": f"{name} says ", "completion": f"{name}, {name}!"} for name in tiny_lm.NAMES]
    return tiny_lm.write_rows(tmp_path / "others.jsonl", rows)


@pytest.fixture
def going_on(model_folder, others, tmp_path, first):
    """`going_on(**changes)`: a run from `first` with other rows, with no setting given that the adapter fixes."""

    def make(**changes):
        values = {"steps": 4, "batch_size": 4, "learning_rate": 5e-3, "precision": "fp32", "threads": 1}
        values |= {"validation": 0, "sample_tokens": 0, "model": str(model_folder), "data": str(others)}
        return TrainConfig(**values | {"adapter": str(first), "out": str(tmp_path / "second")} | changes)

    return make


def test_the_first_loss_is_that_of_the_adapter_in_peft_and_the_last_is_lower(going_on, first, model_folder):
    config = going_on()
    job = set_up(config)
    items = job.batch(0)
    ours = job.task.losses(job.model, job.task.collate(items, job.base))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), first).eval()
    for item, loss in zip(items, ours.tolist(), strict=True):
        logits = theirs(torch.tensor([item.ids])).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(item.ids[1:]), reduction="none")
        assert loss == pytest.approx(float(expected[torch.tensor(item.trained[1:])].sum()), rel=1e-4)
    result = train(config, QUIET)
    losses = [row["loss"] for row in RunFolder(config.out).rows()]
    assert losses[-1] < losses[0]
    before, after = lk.Adapter.load(first), lk.Adapter.load(result.adapter)
    assert before.updates.keys() == after.updates.keys()
    assert all(not torch.equal(before.factors[m].A, after.factors[m].A) for m in before.factors)


def test_what_the_adapter_is_comes_from_it_and_what_is_open_may_differ(going_on):
    config = resolved(going_on(dropout=0.2))
    assert (config.rank, config.alpha, config.dropout) == (3, 7.0, 0.2)
    assert resolved(config) == config
    job = set_up(config)
    assert {p.shape[0] for n, p in job.model.named_parameters() if n.endswith("lora_default.A")} == {3}
    assert TrainConfig(**yaml.safe_load(job.folder.config.read_text())) == config


@pytest.mark.parametrize(
    "given, said",
    [
        ({"rank": 8}, "rank: the adapter has 3, given is 8"),
        ({"alpha": 32}, "alpha: the adapter has 7.0, given is 32.0"),
        ({"targets": ["v_proj"]}, r"targets: the adapter has \['down_proj', 'q_proj'\], given is \['v_proj'\]"),
        ({"variant": "loha"}, "variant: the adapter has 'lora'"),
        ({"save_modules": ["lm_head"]}, "save_modules"),
        ({"task": "classification"}, "task: the adapter has 'causal_lm'"),
    ],
)
def test_settings_that_contradict_it_are_an_error(going_on, given, said):
    config = going_on(**given)
    with pytest.raises(ConfigError, match=said):
        train(config, QUIET)
    assert not RunFolder(config.out).path.exists()


def test_the_config_of_the_run_that_made_it_contradicts_nothing(going_on, make_config, tmp_path):
    """`--config runs/first/config.yaml --adapter runs/first`: "all-linear" there means the adapter's own modules."""
    config = make_config(out=tmp_path / "all", steps=2)
    train(config, QUIET)
    values = yaml.safe_load(RunFolder(config.out).config.read_text())
    again = TrainConfig(**values | {"adapter": config.out, "out": str(tmp_path / "again")})
    assert train(again, QUIET).step == 2


def test_its_record_says_where_it_started(going_on, first):
    result = train(going_on(), QUIET)
    record = json.loads((result.adapter / "lorakit.json").read_text())
    old = json.loads((first / "lorakit.json").read_text())
    assert record["fingerprint"] == old["fingerprint"]
    start = record["started_from"]
    assert start["adapter"] == "adapter"
    assert start["data"] == old["data"] != record["data"]
    assert start["sha256"] == lk.Adapter.load(first).digest()
    assert record["recipe"]["rank"] == 3
    third = train(going_on(adapter=str(result.adapter), out=str(result.adapter.parent) + "-third"), QUIET)
    assert json.loads((third.adapter / "lorakit.json").read_text())["started_from"]["started_from"] == start


def test_another_base_is_refused(going_on, tmp_path):
    other = tiny_lm.save(tmp_path / "other", tiny_lm.llama(seed=5))
    with pytest.raises(AdapterError, match="another base"):
        train(going_on(model=str(other)), QUIET)


def test_the_adapters_base_and_task_are_taken_unless_given(going_on, model_folder, others, first, tmp_path):
    config = TrainConfig(data=str(others), adapter=str(first), out=str(tmp_path / "second"))
    assert resolved(config).model == str(model_folder)
    assert resolved(config).task == "causal_lm"


def test_full_fine_tuning_refuses_it(going_on):
    with pytest.raises(ConfigError, match="method: full trains the base's own weights"):
        train(going_on(method="full"), QUIET)


def test_an_adapter_that_is_not_there_is_an_error_that_names_it(going_on, tmp_path):
    with pytest.raises(AdapterError, match="nowhere"):
        train(going_on(adapter=str(tmp_path / "nowhere")), QUIET)


def test_a_stopped_run_resumes_to_the_same_bits(going_on, tmp_path):
    config = going_on(dropout=0.1, save_every=2)
    train(config, QUIET)
    other = RunFolder(tmp_path / "other")
    shutil.copytree(config.out, other.path)
    shutil.rmtree(other.checkpoints / "step-4")
    train(config.replace(out=str(other.path)), QUIET)
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (other.adapter / file).read_bytes() == (RunFolder(config.out).adapter / file).read_bytes()


def test_peft_goes_on_from_lorakit_and_lorakit_from_peft(going_on, model_folder, tmp_path):
    """An adapter of PEFT's has no fingerprint and no record; the new one has both."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "theirs")
    result = train(going_on(adapter=str(tmp_path / "theirs")), QUIET)
    record = json.loads((result.adapter / "lorakit.json").read_text())
    assert record["fingerprint"]["architecture"] == "LlamaForCausalLM"
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), result.adapter)
    assert again.peft_config["default"].r == 2


def test_a_sweep_starts_each_run_from_it(going_on):
    config = going_on()
    values = {name: getattr(config, name) for name in config.model_fields_set}
    plan = expand(values | {"learning_rate": [1e-3, 2e-2]})
    outcome = sweep(plan, SweepProgress(quiet=True))
    assert len(outcome.entries) == 2
    assert all(entry.failed is None for entry in outcome.entries)


def test_a_classifiers_head_and_labels_go_on(make_config, tmp_path):
    rows = [{"text": f"{n} {w}", "label": w} for n in tiny_lm.NAMES for w in ("good", "bad", "odd")]
    data = tiny_lm.write_rows(tmp_path / "labelled.jsonl", rows)
    first = train(make_config(out=tmp_path / "one", task="classification", data=data, steps=3), QUIET)
    fewer = tiny_lm.write_rows(tmp_path / "fewer.jsonl", [row for row in rows if row["label"] != "bad"])
    values = {"data": str(fewer), "adapter": str(first.adapter), "out": str(tmp_path / "two")}
    config = TrainConfig(**values, steps=2, threads=1, precision="fp32", learning_rate=1e-3)
    assert resolved(config).task == "classification"
    result = train(config, QUIET)
    record = json.loads((result.adapter / "lorakit.json").read_text())
    assert record["data"]["labels"] == ["bad", "good", "odd"]
