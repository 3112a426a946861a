"""Image classification: many classes of models, the head and its names, augmentation, pictures that cannot be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny_vision
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from lorakit.cli import run
from lorakit.errors import ConfigError, DataError, LorakitError, TrainError
from lorakit.tasks import image_classification as task
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
NAMES = ["blue", "green", "red"]
OTHER_PROCESS = """
import json, sys
import numpy, peft, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
base, result, picture = sys.argv[1:]
names = json.load(open(f"{result}/lorakit.json"))["data"]["labels"]
torch.manual_seed(1234)
model = AutoModelForImageClassification.from_pretrained(
    base, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
)
model = peft.PeftModel.from_pretrained(model, result).eval()
made = AutoImageProcessor.from_pretrained(base, backend="pil")(Image.open(picture).convert("RGB"), return_tensors="pt")
logits = model(**made).logits[0]
print(json.dumps({"label": model.config.id2label[int(logits.argmax())], "logits": logits.tolist()}))
"""


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return tiny_vision.save(tmp_path_factory.mktemp("tiny-vit") / "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_vision.write_folders(tmp_path_factory.mktemp("pictures") / "own", 24)


@pytest.fixture
def make(vit_folder, pictures, tmp_path):
    def made(**changes):
        values = {
            "task": "image_classification",
            "model": vit_folder,
            "data": pictures,
            "out": tmp_path / "run",
            "rank": 4,
            "steps": 20,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "precision": "fp32",
            "threads": 1,
            "validation": 0.25,
            "eval_every": 20,
            "patience": 0,
        } | changes
        if values.get("method") == "full":
            del values["rank"]
        return TrainConfig(**values | {name: str(values[name]) for name in ("model", "data", "out")})

    return made


def test_another_process_says_the_same_by_the_same_names(make, pictures):
    config = make()
    result = train(config, QUIET)
    picture = pictures / "green" / "01.png"
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, config.model, result.adapter, picture],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(done.stdout)
    own = json.loads((result.adapter / "adapter_config.json").read_text())
    assert own["task_type"] is None  # as in PEFT's own examples: it has no name for this task
    assert own["modules_to_save"] == ["classifier"]
    assert json.loads((result.adapter / "lorakit.json").read_text())["task"] == "IMAGE_CLASSIFICATION"
    asked = config.replace(data=str(picture.parent.parent), seed=7)
    processor = task.processor(asked)
    items = task.to_predict(asked.replace(labels=NAMES), processor)
    import lorakit as lk

    model = lk.attach(
        task.load(asked, processor, set_up(config).data, torch.float32, torch.device("cpu")),
        lk.Adapter.load(result.adapter),
    )
    found = task.predict(asked, task.Base(model, processor), items, 4)
    at = next(i for i, item in enumerate(items) if item.where.endswith("green/01.png"))
    assert theirs["label"] == found[at]["label"] == "green"
    torch.testing.assert_close(
        torch.tensor(theirs["logits"]).softmax(0),
        torch.tensor([found[at]["scores"][name] for name in NAMES]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert found[at]["score"] == max(found[at]["scores"].values())


HEAD = "ForImageClassification"  # DeiT has a second class with two heads
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
SQUARE = {"image_size": 16, "patch_size": 4}
CLASSES = {
    "BeitConfig": TINY | SQUARE,
    "ConvNextV2Config": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "DeiTConfig": TINY | SQUARE,
    "Dinov2Config": TINY | SQUARE,
    "ResNetConfig": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "SwinConfig": {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    | {"window_size": 4},
    "ViTMSNConfig": TINY | SQUARE,
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_vision_models_are_trained_and_read_by_peft(name, make, tmp_path):
    torch.manual_seed(0)
    own = getattr(transformers, name)(**CLASSES[name], architectures=[f"{name.removesuffix('Config')}{HEAD}"])
    base = AutoModelForImageClassification.from_config(own)
    folder = tiny_vision.save(tmp_path / name, base)
    targets = {"targets": ["convolution"]} if name == "ResNetConfig" else {}
    config = make(model=folder, steps=2, **targets)
    result = train(config, QUIET)
    torch.manual_seed(99)
    fresh = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    theirs = peft.PeftModel.from_pretrained(fresh, result.adapter).eval()
    job = set_up(config)
    from lorakit.train.run import Run

    Run(job, QUIET)
    ours = job.task.evaluate(job.base, job.train[:4], 4)
    batch = job.task.collate(job.train[:4], job.base)
    with torch.inference_mode():
        logits = theirs(pixel_values=batch["pixel_values"]).logits
    assert ours["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch["labels"])), abs=1e-4)


def test_it_learns_and_so_does_a_run_with_all_weights(make):
    for method, rate in (("lora", 5e-3), ("full", 1e-3)):
        result = train(make(method=method, steps=40, learning_rate=rate, out=f"{make().out}-{method}"), QUIET)
        rows = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    model = AutoModelForImageClassification.from_pretrained(result.adapter)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert (result.adapter / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("method", ["bitfit", "probe"])
def test_other_methods_train_and_save_the_head_too(make, method):
    values = make().model_dump(include={"task", "model", "data", "out", "steps", "batch_size", "precision", "threads"})
    result = train(TrainConfig(**values | {"method": method, "steps": 2, "learning_rate": 1e-2}), QUIET)
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    heads = {name for name in tensors if "classifier" in name}
    assert {name.removeprefix("base_model.model.") for name in heads} == {"classifier.weight", "classifier.bias"}
    assert (len(tensors) > len(heads)) == (method == "bitfit")


def test_gradient_checkpointing_changes_nothing_but_memory(make):
    adapters = []
    for on in (False, True):
        result = train(make(steps=3, gradient_checkpointing=on, out=f"{make().out}-{on}"), QUIET)
        adapters.append(load_file(result.adapter / "adapter_model.safetensors"))
    for key, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][key], rtol=1e-5, atol=1e-6)


def test_a_class_without_gradient_checkpointing_says_so(make, tmp_path):
    folder = tiny_vision.save(
        tmp_path / "resnet",
        AutoModelForImageClassification.from_config(transformers.ResNetConfig(**CLASSES["ResNetConfig"])),
    )
    model = AutoModelForImageClassification.from_pretrained(folder)
    if model.supports_gradient_checkpointing:
        pytest.skip("this release has it for ResNet")
    with pytest.raises(TrainError, match="ResNetForImageClassification does not support it"):
        task.checkpoint(model)


# ------------------------------------------------------------------------------------- augmentation


def test_without_augmentation_an_epoch_sees_the_pictures_as_they_are(make):
    job = set_up(make())
    item = job.train[0]
    assert np.array_equal(np.array(job.task.drawn(item, 0, 3).image()), np.array(item.image()))


def test_crops_and_flips_are_functions_of_seed_epoch_and_picture(make):
    job = set_up(make(flip=True, random_crop=0.4))
    item = job.train[0]
    seen = [job.task.drawn(item, 0, epoch) for epoch in range(40)]
    assert [job.task.drawn(item, 0, epoch) for epoch in range(40)] == seen
    assert [job.task.drawn(item, 1, epoch) for epoch in range(40)] != seen
    assert 8 < sum(each.mirrored for each in seen) < 32
    areas = [(each.box[2] - each.box[0]) * (each.box[3] - each.box[1]) / 16**2 for each in seen]
    assert min(areas) < 0.6
    assert max(areas) > 0.8
    for each in seen:
        left, top, right, bottom = each.box
        assert 0 <= left < right <= 16
        assert 0 <= top < bottom <= 16
        assert each.image().size == item.original
        assert each.group == item.group
    assert {each.digest() for each in seen} == {item.digest()}
    off = set_up(make(out=f"{make().out}-off")).train[0]
    assert off.digest() != item.digest()  # a resumed run with another augmentation is another run


def test_a_mirrored_picture_is_its_mirror_image(make):
    item = set_up(make(flip=True)).train[0]
    plain, mirrored = np.array(item.image()), np.array(replace(item, mirrored=True).image())
    assert np.array_equal(mirrored, plain[:, ::-1])


def test_a_run_with_augmentation_resumes_to_the_same_bits(make):
    options = {"flip": True, "random_crop": 0.5, "steps": 6, "eval_every": 3, "save_every": 3, "keep": 4}
    config = make(**options)
    whole, resumed = train(config, QUIET), Path(f"{config.out}-resumed")
    shutil.copytree(config.out, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-6")
    shutil.rmtree(resumed / "adapter")
    train(config.replace(out=str(resumed)), QUIET)
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (whole.adapter / file).read_bytes() == (resumed / "adapter" / file).read_bytes()


# ------------------------------------------------------------------------------------- pictures


def test_pictures_of_every_mode_become_rgb(tmp_path, make):
    folder = tiny_vision.write_folders(tmp_path / "modes", 12)
    rgb = tiny_vision.picture("red", 5)
    for mode in ("L", "RGBA", "CMYK", "P", "1", "LA"):
        path = folder / "red" / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        rgb.convert("L").convert("LA").save(path) if mode == "LA" else rgb.convert(mode).save(path)
    job = set_up(make(data=folder, validation=0))
    batch = job.task.collate(job.train, job.base)
    assert batch["pixel_values"].shape == (18, 3, 16, 16)
    at = {Path(item.where).stem: row for item, row in zip(job.train, batch["pixel_values"], strict=True)}
    torch.testing.assert_close(at["RGBA"], tiny_vision.pixels_of(rgb)[0])
    assert (at["CMYK"] - tiny_vision.pixels_of(rgb)[0]).abs().mean() < 0.1


def test_broken_pictures_are_named_together_and_can_be_left_out(tmp_path, make):
    folder = tiny_vision.write_folders(tmp_path / "broken", 12)
    (folder / "red" / "cut.png").write_bytes((folder / "red" / "02.png").read_bytes()[:60])
    (folder / "blue" / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"2 of 14 pictures cannot be used(.|\n)*text\.jpg(.|\n)*cut\.png"):
        set_up(make(data=folder))
    job = set_up(make(data=folder, broken="skip"))
    assert len(job.train) + len(job.held_out) == 12
    assert any("broken, left out" in note for note in job.data.notes)


def test_rows_name_pictures_beside_them(tmp_path, make):
    path = tiny_vision.write_rows(tmp_path / "rows", 24)
    by_rows, by_folder = set_up(make(data=path)), set_up(make(data=path.parent, out=f"{make().out}-2"))
    assert by_rows.data.about == by_folder.data.about
    assert by_rows.data.about == {"labels": NAMES, "background": "white", "animated": "refuse"}
    assert {i.content: i.label for i in by_rows.train} == {i.content: i.label for i in by_folder.train}
    table = tmp_path / "rows" / "own.csv"
    table.write_text(
        "file,kind\n"
        + "".join(f"{p.relative_to(path.parent)},{p.parent.name}\n" for p in sorted(path.parent.glob("*/*.png")))
    )
    job = set_up(make(data=table, columns={"image": "file", "label": "kind"}, out=f"{make().out}-3"))
    assert job.data_hash == by_rows.data_hash


def test_a_picture_that_is_not_there_is_named_with_the_nearest(tmp_path, make):
    path = tiny_vision.write_rows(tmp_path / "rows", 6)
    path.write_text(path.read_text().replace("blue/00.png", "blue/0.png", 1))
    with pytest.raises(DataError, match=r"own\.jsonl, row 1: there is no picture 'blue/0\.png'"):
        set_up(make(data=path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "red/02.png"}, "no column label|its label is None"),
        ({"image": "red/02.png", "label": 1.5}, "its label is 1.5"),
        ({"image": 3, "label": "red"}, "its image is 3"),
        ({"picture": "red/02.png", "label": "red"}, "no column image"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, make, row, said):
    path = tiny_vision.write_rows(tmp_path / "rows", 6)
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said):
        set_up(make(data=path))


def test_pictures_outside_of_folders_are_named(tmp_path, make):
    folder = tiny_vision.write_folders(tmp_path / "own", 6)
    tiny_vision.picture("red", 1).save(folder / "loose.png")
    with pytest.raises(DataError, match=r"no folder named by their label: loose\.png"):
        set_up(make(data=folder))


def test_labels_can_be_named_in_another_order_and_must_hold_all(make):
    job = set_up(make(labels=["red", "green", "blue"]))
    assert {Path(item.where).parent.name: item.label for item in job.train} == {"red": 0, "green": 1, "blue": 2}
    with pytest.raises(DataError, match="the label 'green' is none of 2"):
        set_up(make(labels=["red", "blue"], out=f"{make().out}-2"))


def test_one_label_is_not_enough(tmp_path, make):
    folder = tiny_vision.write_folders(tmp_path / "own", 6)
    for label in ("blue", "green"):
        shutil.rmtree(folder / label)
    with pytest.raises(ConfigError, match="every picture has the label 'red'"):
        set_up(make(data=folder))


# ------------------------------------------------------------------------------------- the base


def test_a_base_with_a_head_for_other_labels_gets_a_fresh_one_and_loses_nothing_else(make, vit_folder, tmp_path):
    job = set_up(make())
    assert job.model.config.id2label == dict(enumerate(NAMES))
    assert job.model.get_parameter("classifier.weight").shape == (3, 32)
    wide = AutoModelForImageClassification.from_pretrained(vit_folder)
    tensors = {**wide.state_dict(), "vit.layernorm.weight": torch.ones(7)}
    other = tiny_vision.save(tmp_path / "wrong")
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match=r"weights of other sizes.*vit\.layernorm\.weight"):
        set_up(make(model=other, out=f"{make().out}-2"))


def test_a_base_without_an_image_processor_says_so(tmp_path, make):
    folder = tmp_path / "bare"
    tiny_vision.vit().save_pretrained(folder)
    with pytest.raises(LorakitError, match=r"has no image processor: preprocessor_config\.json is missing"):
        set_up(make(model=folder))


def test_a_picture_that_the_base_does_not_take_is_found_before_the_first_step(tmp_path, make):
    folder = tiny_vision.save(tmp_path / "keeps-sizes", resize=False)
    data = tiny_vision.write_folders(tmp_path / "own", 6, ((24, 24),))
    with pytest.raises(TrainError, match="does not take the picture as its image processor makes it, 3 x 24 x 24"):
        set_up(make(model=folder, data=data))


@pytest.mark.parametrize(("setting", "value"), [("max_length", 12), ("resolution", 64), ("add_tokens", ["<a>"])])
def test_settings_of_other_tasks_are_refused(make, setting, value):
    with pytest.raises(ConfigError, match=f"{setting}(: task| has no effect with task: ).*image_classification"):
        set_up(make(**{setting: value}))


def test_pillow_is_asked_for_where_it_is_missing(make, monkeypatch):
    from lorakit.bases import load_processor

    monkeypatch.setattr(load_processor, "find_spec", lambda name: None)
    with pytest.raises(LorakitError, match=r"pip install pillow, or 'lorakit\[image\]'"):
        set_up(make())


def test_the_rows_are_recognized():
    assert task.recognizes({"image": "a.png", "label": "cat"})
    assert task.recognizes({"image": {"bytes": b"", "path": None}, "label": 3})
    assert not task.recognizes({"image": "a.png", "text": "a cat"})
    assert not task.recognizes({"image": "a.wav", "label": "cat"})
    assert not task.recognizes({"text": "a", "label": "cat"})


# ------------------------------------------------------------------------------------- the command line


def test_train_plan_and_eval_on_the_command_line(vit_folder, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    rows = tiny_vision.write_rows(tmp_path / "rows", 24)
    out = tmp_path / "run"
    flags = ["--rank", "4", "--steps", "40", "--batch-size", "8", "--lr", "5e-3", "--precision", "fp32"]
    flags += ["--threads", "1"]
    model = ["--model", str(vit_folder)]
    assert run(["train", "--data", str(rows), *model, "--out", str(out), *flags]) == 0  # the rows say which task
    said = capsys.readouterr().out
    assert "image_classification: predict a label for a picture (a vision model)" in said
    assert "3 labels: blue, green, red" in said
    assert "augmented" in said
    assert "trained pictures/s" in said
    assert run(["card", str(out)]) == 0
    capsys.readouterr()
    page = (out / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in page
    assert "model = ...  # the base" in page
    judge = ["eval", str(pictures), *model, "--adapter", f"mine={out}/adapter", "--precision", "fp32"]
    assert run([*judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "image_classification"
    (row,) = found["results"]
    assert (row["adapter"], row["rows"]) == ("mine", 24)
    assert row["accuracy"] > 0.8
    assert run(["predict", str(rows), *model, "--adapter", f"{out}/adapter", "--precision", "fp32"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [json.loads(row)["image"] for row in rows.read_text().splitlines()]
    assert sum(line["prediction"]["label"] == line["label"] for line in lines) > 19
    (alone := tmp_path / "alone").mkdir()
    tiny_vision.picture("red", 50).save(alone / "what.png")  # no folder names its label
    assert run(["predict", str(alone), *model, "--adapter", f"{out}/adapter", "--precision", "fp32"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["from"] == str(alone / "what.png")
    assert line["prediction"]["label"] == "red"
    assert run(["plan", "--task", "image_classification", "--labels", "a,b,c", *model]) == 0
    said = capsys.readouterr().out
    assert "classifier" in said
    assert "--task image_classification" in said
    assert run(["train", "--data", str(pictures), *model, "--out", str(tmp_path / "other")]) == 2
    assert "--task image_classification" in capsys.readouterr().err


def test_a_single_color_picture_file_is_refused_as_data(tmp_path, make):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="is one picture"):
        set_up(make(data=tmp_path / "one.png"))
