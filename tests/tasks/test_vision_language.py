"""Conversations with pictures: the processor's own ids, the answers' mask, what is adapted, answers, refusals."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import tiny_vision
import tiny_visual
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorakit.cli import run
from lorakit.errors import ConfigError, DataError, LorakitError
from lorakit.tasks import vision_language as task
from lorakit.tasks.media.visual import Visual
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_visual.save(tmp_path_factory.mktemp("tiny-visual") / "llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_visual.write_rows(tmp_path_factory.mktemp("conversations") / "own")


@pytest.fixture
def make(llava, rows, tmp_path):
    def made(**changes):
        values = {
            "task": "vision_language",
            "model": llava,
            "data": rows,
            "out": tmp_path / "run",
            "rank": 4,
            "steps": 4,
            "batch_size": 6,
            "micro_batch": 3,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "threads": 1,
            "validation": 0.25,
            "eval_every": 4,
            "patience": 0,
            "sample_tokens": 4,
        } | changes
        if values.get("method") == "full":
            del values["rank"]
        return TrainConfig(**values | {name: str(values[name]) for name in ("model", "data", "out")})

    return made


def given(row, folder):
    """A row's messages as transformers takes them: with the pictures themselves."""
    return [
        turn
        | {
            "content": [
                {"type": "image", "image": Image.open(folder / part["image"])} if part["type"] == "image" else part
                for part in turn["content"]
            ]
        }
        if isinstance(turn["content"], list)
        else turn
        for turn in row["messages"]
    ]


def test_ids_are_those_of_the_processor_and_only_answers_are_trained(make, rows, llava):
    job = set_up(make(validation=0))
    processor = AutoProcessor.from_pretrained(llava, backend="pil")
    for item in job.train:
        row = item.row.values
        theirs = processor.apply_chat_template(
            given(row, rows.parent), tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert item.ids == theirs["input_ids"][0].tolist()
        torch.testing.assert_close(job.task.collate([item], job.base)["pixel_values"], theirs["pixel_values"])
        trained = [token for token, is_trained in zip(item.ids, item.trained, strict=True) if is_trained]
        assert processor.tokenizer.decode(trained) == row["messages"][1]["content"] + "</s>"
        assert item.ids.count(258) == 16 * len(item.pictures)


def test_columns_of_pictures_give_the_same_rows(make, rows, tmp_path):
    wanted = set_up(make(validation=0)).train
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    made = {"columns": [], "marked": [], "parts": []}
    for line in lines:
        user, assistant = line["messages"]
        names = [str(rows.parent / part["image"]) for part in user["content"] if part["type"] == "image"]
        text = user["content"][-1]["text"]
        made["columns"].append({"pics": names, "prompt": text, "completion": assistant["content"]})
        marked = user | {"content": "<image>" * len(names) + text}
        made["marked"].append({"images": names, "messages": [marked, assistant]})
        bare = [{"type": "image"}] * len(names) + [{"type": "text", "text": text}]
        made["parts"].append({"images": names, "messages": [user | {"content": bare}, assistant]})
    for name, each in made.items():
        path = tiny_lm.write_rows(tmp_path / f"{name}.jsonl", each)
        columns = {"images": "pics"} if name == "columns" else {}
        job = set_up(make(validation=0, data=path, columns=columns, out=tmp_path / name))
        assert [item.digest() for item in job.train] == [item.digest() for item in wanted]


def test_a_conversation_of_two_turns_keeps_its_pictures_in_place(make, tmp_path):
    tiny_vision.picture("red", 1).save(tmp_path / "a.png")
    tiny_vision.picture("blue", 2).save(tmp_path / "b.png")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "blue"},
    ]
    path = tiny_lm.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    (item,) = set_up(make(validation=0, data=path)).train
    trained = [token for token, is_trained in zip(item.ids, item.trained, strict=True) if is_trained]
    tokenizer = tiny_visual.tokenizer()
    assert tokenizer.decode(trained) == "red</s>blue</s>"
    pictures = "<image>" * 16
    assert tokenizer.decode(item.ids) == (
        f"<user>one{pictures}<assistant>red</s><user>{pictures}two<assistant>blue</s>"
    )
    assert item.prompt == len(tokenizer.encode(f"<user>one{pictures}<assistant>"))


def test_the_language_model_alone_is_adapted_unless_targets_say_otherwise(make, tmp_path):
    result = train(make(), QUIET)
    names = load_file(result.adapter / "adapter_model.safetensors")
    assert names
    assert all(".language_model." in name for name in names)
    own = make(targets=["q_proj", "linear_1"], steps=1, out=tmp_path / "both")
    names = load_file(train(own, QUIET).adapter / "adapter_model.safetensors")
    assert any(".vision_tower." in name for name in names)
    assert any(".multi_modal_projector." in name for name in names)
    facts = dict(set_up(make(out=tmp_path / "new")).data.facts)
    assert "vision tower stays as it is" in facts["adapted"]


def test_answers_are_those_of_transformers_and_do_not_depend_on_the_batch(make, rows, llava):
    config = make(steps=8, learning_rate=3e-2)
    train(config, QUIET)
    job = set_up(config)
    Run(job, QUIET)
    items = task.to_predict(config, job.base.processor)
    found = task.predict(config, job.base, items, 5)
    assert [each["answer"] for each in found] == [each["answer"] for each in task.predict(config, job.base, items, 1)]
    processor = AutoProcessor.from_pretrained(llava, backend="pil")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for row, each in list(zip(lines, found, strict=True))[:4]:
        asked = given({"messages": row["messages"][:1]}, rows.parent)
        inputs = processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = job.model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=tiny_lm.EOS)
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert each["answer"] == text.strip()


def test_the_pictures_are_what_it_answers_by(make, tmp_path):
    """Rows that differ in their pictures alone: without these no answer could be right more often than one in three."""
    folder = tmp_path / "colours"
    folder.mkdir()
    made = []
    for number in range(48):
        colour = list(tiny_vision.COLOURS)[number % 3]
        Image.new("RGB", (16, 16), tiny_vision.COLOURS[colour]).save(folder / f"{number}.png")
        made.append({"image": f"{number}.png", "prompt": "what?", "completion": colour[0]})
    path = tiny_lm.write_rows(folder / "rows.jsonl", made)
    # The base is random: its output layer is trained too, as no word can be said by what is drawn at random.
    config = make(data=path, steps=40, batch_size=12, micro_batch=12, validation=0, rank=8, save_modules=["lm_head"])
    result = train(config, QUIET)
    assert result.loss < 0.1  # nats a token: without the pictures at least ln 3 / 2 = 0.55
    job = set_up(config)
    Run(job, QUIET)
    items = task.to_predict(config, job.base.processor)
    answers = [each["answer"] for each in task.predict(config, job.base, items, 16)]
    assert sum(answer == row["completion"] for answer, row in zip(answers, made, strict=True)) >= 44


def test_gradient_checkpointing_changes_nothing_but_memory(make, tmp_path):
    adapters = []
    for on in (False, True):
        result = train(make(gradient_checkpointing=on, steps=2, out=tmp_path / f"run-{on}"), QUIET)
        adapters.append(load_file(result.adapter / "adapter_model.safetensors"))
    for key, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][key], rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_saves_a_model_with_its_processor(make):
    result = train(make(method="full", steps=1, learning_rate=1e-4), QUIET)
    assert type(AutoModelForImageTextToText.from_pretrained(result.adapter)).__name__.startswith("Llava")
    assert AutoProcessor.from_pretrained(result.adapter, backend="pil").image_token_id == 258


# ------------------------------------------------------------------------------------- refusals


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def asking(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (asking({"type": "image", "image": "b.png"}), r"there is no picture 'b\.png'(.|\n)*did you mean 'a\.png'"),
        (asking({"type": "image"}), "names no picture, and the row has no more of them"),
        (asking({"type": "image", "image": "https://x.y/a.png"}), "is an address; pictures are read from files"),
        (asking({"type": "video", "video": "a.mp4"}), "of type video"),
        (asking({"type": "image", "image": "text.png"}), "1 of 1 pictures cannot be used"),
        ({"image": "a.png", "completion": "x"}, "no messages, and no prompt"),
        ({"prompt": "x", "completion": "x"}, "no messages, and no picture"),
        ({"images": ["a.png", "a.png"], **asking({"type": "image"})}, "2 pictures, and its messages have 1 places"),
        ({"messages": [USER, ANSWER]}, "no row has a picture(.|\n)*causal_lm"),
        (asking({"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}), "1 pictures, and .* has 2"),
    ],
)
def test_rows_that_cannot_be_used_say_why(make, tmp_path, row, said):
    tiny_vision.picture("red", 1).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=said):
        set_up(make(data=tiny_lm.write_rows(tmp_path / "rows.jsonl", [row])))


def test_a_long_row_is_dropped_whole_and_counted(make):
    lengths = sorted(item.size for item in set_up(make(validation=0)).train)
    job = set_up(make(validation=0, max_length=lengths[-1] - 1, out=f"{make().out}-2"))
    assert len(job.train) < len(lengths)
    assert "dropped" in dict(job.data.facts)["length"]
    with pytest.raises(DataError, match="every row is longer than max_length 8"):
        set_up(make(max_length=8, out=f"{make().out}-3"))


def test_a_base_without_a_chat_template_or_a_processor_says_so(make, tmp_path):
    bare = tiny_visual.save(tmp_path / "bare", chat_template=None)
    with pytest.raises(ConfigError, match="has no chat template"):
        set_up(make(model=bare))
    text = tiny_lm.save(tmp_path / "text")
    with pytest.raises(LorakitError, match=r"has no processor of texts with pictures|cannot load"):
        set_up(make(model=text))


def test_a_processor_whose_inputs_are_put_together_otherwise_is_refused():
    """Idefics3's and LLaVA-Next's, for example: pixels by row, padded to the row with the most pictures."""

    class ByRow(type(tiny_visual.processor())):
        def __call__(self, **kwargs):
            made = super().__call__(**kwargs)
            return {**made, "pixel_values": made["pixel_values"][None]}

    plain = tiny_visual.processor()
    Visual(plain, "llava")
    other = ByRow(
        plain.image_processor,
        plain.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    )
    with pytest.raises(LorakitError, match=r"puts its inputs together in a way(.|\n)*pixel_values of two rows"):
        Visual(other, "another")


def test_rows_are_recognized():
    assert task.recognizes(asking({"type": "image", "image": "a.png"}))
    assert task.recognizes({"image": "a.png", "prompt": "what?", "completion": "red"})
    seen = USER | {"content": "<image> hi"}
    assert task.recognizes({"images": ["a.png"], "messages": [seen, ANSWER]})
    assert not task.recognizes({"messages": [USER, ANSWER]})
    cover = {"image": "cover.png", "messages": [USER, ANSWER]}  # a column that says something of the text
    assert not task.recognizes(cover)
    assert not task.recognizes({"images": ["cover.png"], "messages": [USER, ANSWER]})
    assert task.recognizes(cover, [cover, {"images": ["a.png"], "messages": [seen, ANSWER]}])
    assert not task.recognizes({"image": "a.png", "label": "red"})
    assert not task.recognizes({"image": "a.png", "text": "a red square"})
    assert not task.recognizes({"prompt": "a", "completion": "b"})


def test_train_eval_and_predict_on_the_command_line(llava, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out, model = tmp_path / "run", ["--model", str(llava)]
    flags = ["--rank", "4", "--steps", "4", "--batch-size", "6", "--lr", "1e-2", "--precision", "fp32"]
    flags += ["--threads", "1", "--sample-tokens", "3"]
    assert run(["train", "--data", str(rows), *model, "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "vision_language: answer in conversations with pictures" in said
    assert "its vision tower stays as it is" in said
    assert run(["card", str(out)]) == 0
    capsys.readouterr()
    page = (out / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in page
    assert "AutoModelForCausalLM" not in page  # as PEFT's task_type would have it
    judge = [str(rows), *model, "--adapter", f"{out}/adapter", "--precision", "fp32"]
    assert run(["eval", *judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "vision_language"
    assert run(["predict", *judge, "--max-new-tokens", "3", "--limit", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert all({"messages", "prediction"} == line.keys() for line in lines)
