"""Qwen2-VL: patches of all pictures in one sequence with a grid for each, and positions in three dimensions.

Its processor needs torchvision for videos. Here the same class makes pictures alone, so that everything else is tried.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import peft
import pytest
import tiny_lm
import tiny_vision
import tiny_visual
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText

from lorakit.errors import LorakitError
from lorakit.tasks import vision_language as task
from lorakit.tasks.media import visual
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_visual.save_qwen2_vl(tmp_path_factory.mktemp("tiny-qwen") / "qwen2-vl")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pictures of two sizes, so of different grids."""
    folder = tmp_path_factory.mktemp("conversations") / "own"
    path = tiny_visual.write_rows(folder, 12)
    for number, picture in enumerate(sorted(folder.glob("*.png"))):
        if number % 3:
            Image.open(picture).resize((24, 16)).save(picture)
    return path


@pytest.fixture
def make(qwen, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(visual, "load_vision_processor", lambda *_: tiny_visual.qwen2_vl_processor())

    def made(**changes):
        values = {
            "task": "vision_language",
            "model": str(qwen),
            "data": str(rows),
            "out": str(tmp_path / "run"),
            "rank": 4,
            "steps": 3,
            "batch_size": 6,
            "micro_batch": 3,
            "learning_rate": 3e-2,
            "precision": "fp32",
            "threads": 1,
            "validation": 0.25,
            "eval_every": 3,
            "patience": 0,
            "sample_tokens": 3,
        }
        return TrainConfig(**values | changes)

    return made


def by_hand(model, item):
    """The loss of a row by the processor's own inputs, for its text as it was before the pictures' ids."""
    processor = tiny_visual.qwen2_vl_processor()
    turns = item.row.values["messages"]
    text = processor.apply_chat_template(turns)
    inputs = processor(text=[text], images=[item.images()], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == item.ids
    logits = model(**inputs).logits[0, :-1]
    losses = F.cross_entropy(logits, torch.tensor(item.ids[1:]), reduction="none")
    return losses[torch.tensor(item.trained[1:])].sum()


def test_losses_are_those_of_the_processors_inputs_whatever_shares_the_batch(make):
    job = set_up(make())
    items = job.train[:6]
    assert {picture.size for item in items for picture in item.pictures} == {(16, 16), (24, 16)}
    batch = job.task.collate(items, job.base)
    assert batch["image_grid_thw"].shape == (sum(len(item.pictures) for item in items), 3)
    together = job.task.losses(job.model, batch)
    for item, loss in zip(items, together, strict=True):
        (alone,) = job.task.losses(job.model, job.task.collate([item], job.base))
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, by_hand(job.model, item), rtol=1e-4, atol=1e-4)


def test_its_adapter_has_the_language_model_alone_and_is_the_same_in_peft(make, qwen):
    config = make()
    result = train(config, QUIET)
    job = set_up(config)
    Run(job, QUIET)
    job.model.eval()
    theirs = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(qwen), result.adapter).eval()
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert written["target_modules"]
    assert not any(part in name for name in written["target_modules"] for part in ("visual", "qkv", "fc1"))
    for item in job.train[:3]:
        (ours,) = job.task.losses(job.model, job.task.collate([item], job.base))
        torch.testing.assert_close(by_hand(theirs, item), ours, rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_what_shares_their_batch_and_are_transformers(make):
    config = make()
    train(config, QUIET)
    job = set_up(config)
    Run(job, QUIET)
    items = task.to_predict(config, job.base.processor)[:4]
    found = task.predict(config, job.base, items, 4)
    assert found == task.predict(config, job.base, items, 1)
    processor = tiny_visual.qwen2_vl_processor()
    for item, each in zip(items, found, strict=True):
        text = processor.apply_chat_template(item.row.values["messages"][:1], add_generation_prompt=True)
        inputs = processor(text=[text], images=[item.images()], return_tensors="pt")
        ids = job.model.eval().generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=tiny_lm.EOS)
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert each["answer"] == answer.strip()


def test_it_answers_by_its_pictures(make, tmp_path):
    made = []
    for number in range(24):
        colour = list(tiny_vision.COLOURS)[number % 3]
        Image.new("RGB", (16, 16), tiny_vision.COLOURS[colour]).save(tmp_path / f"{number}.png")
        made.append({"image": f"{number}.png", "prompt": "what?", "completion": colour[0]})
    path = tiny_lm.write_rows(tmp_path / "rows.jsonl", made)
    options = {"save_modules": ["lm_head"], "steps": 40, "batch_size": 12, "micro_batch": 12, "validation": 0}
    assert train(make(data=str(path), **options), QUIET).loss < 0.2  # nats a token; without pictures ln 3 / 2 = 0.55


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_without_torchvision_its_processor_says_what_to_install(qwen):
    from lorakit.bases.load_processor import load_vision_processor

    with pytest.raises(LorakitError, match="pip install torchvision"):
        load_vision_processor(str(qwen))
