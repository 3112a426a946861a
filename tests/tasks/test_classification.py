"""Classification: the head is trained and saved, its labels keep their names, figures are right; from the command line
too.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import tiny_lm
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.cli import run
from lorakit.errors import ConfigError, LorakitError, TrainError
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.train import train

QUIET = Progress(quiet=True)
ENDS = {"good": "!", "bad": ".", "plain": "?"}
OTHER_PROCESS = """
import json, sys
import peft, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, result, text = sys.argv[1:]
names = json.load(open(f"{result}/lorakit.json"))["data"]["labels"]
torch.manual_seed(1234)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), id2label=dict(enumerate(names)))
tokenizer = AutoTokenizer.from_pretrained(base)
model.config.pad_token_id = tokenizer.pad_token_id
model = peft.PeftModel.from_pretrained(model, result).eval()
logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
print(json.dumps({"label": model.config.id2label[int(logits.argmax())], "logits": logits.tolist()}))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made = [
        {"text": f"{name} sees {what}{end}", "label": label}
        for name in tiny_lm.NAMES
        for label, end in ENDS.items()
        for what in ("tea", "the winding road")
    ]
    return tiny_lm.write_rows(tmp_path_factory.mktemp("labelled") / "rows.jsonl", made)


@pytest.fixture
def make(make_config, rows):
    def made(**changes):
        return make_config(**{"task": "classification", "data": rows, "learning_rate": 2e-2, "patience": 0} | changes)

    return made


def test_the_head_is_trained_and_saved_as_peft_does(make):
    config = make(steps=5)
    result = train(config, QUIET)
    told = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 32)
    fresh = set_up(config.replace(out=config.out + "-again")).model
    assert not torch.equal(tensors["base_model.model.score.weight"], fresh.get_parameter("score.weight"))
    assert not any("score.lora" in name for name in tensors)


def test_another_process_with_another_seed_says_the_same_by_the_same_names(make):
    """A head that was lost would be at random again: huggingface/peft 310, 577."""
    config = make(steps=30)
    result = train(config, QUIET)
    job = set_up(config)
    model = lk.attach(
        job.task.load(config.replace(seed=7), job.base.processor, job.data, torch.float32, job.model.device),
        lk.Adapter.load(result.adapter),
    )
    text = "Finn sees tea."
    with torch.inference_mode():
        logits = model.eval()(**job.base.processor(text, return_tensors="pt")).logits[0]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, config.model, result.adapter, text],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["label"] == model.config.id2label[int(logits.argmax())] == "bad"
    torch.testing.assert_close(torch.tensor(told["logits"]), logits, rtol=1e-4, atol=1e-4)


def test_the_head_starts_from_the_seed_alone(make):
    heads = [
        set_up(make(seed=seed, out=f"{make().out}-{i}")).model.get_parameter("score.weight")
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_encoder_learns_too(make, tmp_path):
    """Its head is `classifier`, on the first token's state."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=96,
            pad_token_id=tiny_lm.PAD,
            initializer_range=0.2,
        )
    )
    data = tiny_lm.write_rows(
        tmp_path / "own.jsonl", [{"text": f"{e} {n}", "label": x} for n in tiny_lm.NAMES for x, e in ENDS.items()]
    )
    config = make(model=tiny_lm.save(tmp_path / "bert", bert), data=data, steps=30, eval_every=30, learning_rate=1e-2)
    result = train(config, QUIET)
    told = json.loads((result.adapter / "adapter_config.json").read_text())
    assert told["modules_to_save"] == ["classifier"]
    assert {
        n.removeprefix("base_model.model.")
        for n in load_file(result.adapter / "adapter_model.safetensors")
        if "lora" not in n
    } == {"classifier.weight", "classifier.bias"}
    rows = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_full_fine_tuning_saves_a_classifier_with_its_names(make):
    from transformers import AutoModelForSequenceClassification

    result = train(make(method="full", steps=3, learning_rate=1e-3), QUIET)
    model = AutoModelForSequenceClassification.from_pretrained(result.adapter)
    assert model.config.id2label == {0: "bad", 1: "good", 2: "plain"}


def test_the_held_out_figures_are_those_of_the_held_out_rows(make):
    config = make(steps=2, eval_every=2)
    result = train(config, QUIET)
    job = set_up(config.replace(out=config.out + "-again"))
    model = lk.attach(
        job.task.load(config, job.base.processor, job.data, torch.float32, job.model.device),
        lk.Adapter.load(result.adapter),
    )
    with torch.inference_mode():
        guessed = [int(model.eval()(torch.tensor([item.ids])).logits[0].argmax()) for item in job.held_out]
    right = sum(guess == item.label for guess, item in zip(guessed, job.held_out, strict=True)) / len(guessed)
    row = next(
        json.loads(line)
        for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()
        if "held_out" in line
    )
    assert row.keys() == {"step", "held_out_loss", "held_out_accuracy", "held_out_macro_f1", "held_out_matthews"}
    assert row["held_out_accuracy"] == pytest.approx(right, abs=1e-4)


def test_such_runs_train_alone():
    asked = {"data": "rows.jsonl", "task": "classification"}
    with pytest.raises(ConfigError, match="classification trains a head in full"):
        expand(asked | {"rank": [4, 8]})
    with pytest.raises(ConfigError, match="which task: classification does not allow"):
        TrainConfig(**asked, find_lr=True)


def test_a_base_that_lacks_more_than_a_head_says_how_to_train_the_rest(make, tmp_path):
    """DistilBERT has a layer before its classifier, which PEFT would leave at random and not save."""
    from transformers import DistilBertConfig, DistilBertModel

    base = DistilBertModel(
        DistilBertConfig(vocab_size=258, dim=32, hidden_dim=48, n_layers=1, n_heads=4, max_position_embeddings=96)
    )
    folder = tiny_lm.save(tmp_path / "distilbert", base)
    with pytest.raises(LorakitError, match=r"save_modules: \[pre_classifier\]"):
        train(make(model=folder), QUIET)
    result = train(make(model=folder, save_modules=["pre_classifier"], steps=1), QUIET)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["modules_to_save"] == [
        "pre_classifier",
        "classifier",
    ]


def test_an_encoder_decoder_is_refused(make, tmp_path):
    with pytest.raises(TrainError, match="encoder-decoder"):
        train(make(model=tiny_lm.save(tmp_path / "t5", tiny.t5(vocab_size=258))), QUIET)


def test_train_and_eval_on_the_command_line(rows, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = tmp_path / "run"
    flags = [
        "--rank",
        "4",
        "--steps",
        "30",
        "--batch-size",
        "8",
        "--lr",
        "2e-2",
        "--precision",
        "fp32",
        "--threads",
        "1",
    ]
    assert (
        run(
            [
                "train",
                "--task",
                "classification",
                "--data",
                str(rows),
                "--model",
                str(model_folder),
                "--out",
                str(out),
                *flags,
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "3 labels: bad, good, plain" in told
    assert "trained rows/s" in told
    assert "accuracy" in told
    assert (
        told.splitlines()[-1].partition("   #")[0]
        == f"next: lorakit eval TEST.jsonl --model {model_folder} --adapter {out}/adapter "
        "--precision fp32 --task classification"
    )
    assert "lorakit chat" not in told
    judge = ["eval", str(rows), "--model", str(model_folder), "--adapter", f"mine={out}/adapter", "--precision", "fp32"]
    assert run([*judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "classification"  # told by the adapter
    (row,) = found["results"]
    assert (row["adapter"], row["rows"]) == ("mine", 72)
    assert row["accuracy"] > 0.9
    assert run(judge) == 0
    assert "macro f1" in capsys.readouterr().out
    assert run(["card", str(out)]) == 0
    page = (out / "adapter" / "README.md").read_text()
    assert 'labels = ["bad", "good", "plain"]' in page
    assert "num_labels=len(labels)" in page
    assert "| step | loss | accuracy | macro f1 | Matthews |" in page
    assert "train on" not in page
