"""What every task keeps: data to items, one loss for training and evaluation, whatever items share a batch; its adapter
loads in PEFT, or in diffusers.
"""

from __future__ import annotations

import io
import json
import shutil
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny_lm
import tiny_pictures
import tiny_seq
import tiny_speech
import tiny_vision
import tiny_visual
import torch
import torch.nn.functional as F
import yaml
from diffusers import StableDiffusionPipeline
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)

from lorakit.bases.load import load_config
from lorakit.data.dataset import fingerprint
from lorakit.errors import ConfigError
from lorakit.generate.eval_mode import evaluating
from lorakit.methods.lora import base_alone
from lorakit.plan.static import static_estimate
from lorakit.tasks import task_for, task_names, task_of, task_of_adapter
from lorakit.tasks.image.loss import fixed_losses
from lorakit.tasks.task import Base, Task, weight_of
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
    """`write`: writes data to learn into a folder; `count`: its items; `loss`: of one item, by other means than the
    task's; `tuned`: a result on its base, as other programs load it; `files`: of a result; `losses`: the task's, of
    items, without chance; `model`: the fixture with the base's folder, None for the tiny language
    model.
    """

    write: Callable[[Path], Path]
    count: int
    loss: Callable[[Any, Any], torch.Tensor]
    tuned: Callable[[str, Path], Any]
    files: tuple[str, ...] = ("adapter_model.safetensors", "adapter_config.json", "lorakit.json")
    losses: Callable[[Any, Any], torch.Tensor] = lambda job, items: job.task.losses(
        job.model, job.task.collate(items, job.base)
    )
    model: str | None = None
    planned: Callable[[Any], tuple[int, float]] = lambda made: (made["input_ids"].shape[1], 1.0)  # size and share
    changes: Mapping[str, Any] = field(default_factory=dict)


def causal_loss(model: Any, item: Any) -> torch.Tensor:
    logits = model(torch.tensor([item.ids])).logits[0, :-1]
    targets = torch.tensor(item.ids[1:])
    return F.cross_entropy(logits, targets, reduction="none")[torch.tensor(item.trained[1:])].sum()


def label_loss(model: Any, item: Any) -> torch.Tensor:
    return -model(torch.tensor([item.ids])).logits[0].log_softmax(0)[item.label]


def number_loss(model: Any, item: Any) -> torch.Tensor:
    return (model(torch.tensor([item.ids])).logits[0, 0] - item.label) ** 2


def tags_loss(model: Any, item: Any) -> torch.Tensor:
    logs = model(torch.tensor([item.ids])).logits[0].log_softmax(1)
    return -sum(logs[place, label] for place, label in enumerate(item.labels) if label >= 0)


def losses_without_chance(job: Any, items: Any) -> torch.Tensor:
    """Of a task whose class in transformers has dropout before its head."""
    with evaluating(job.model):
        return job.task.losses(job.model, job.task.collate(items, job.base))


def span_loss(model: Any, item: Any) -> torch.Tensor:
    made = model(torch.tensor([item.ids]))
    logs = (made.start_logits[0].log_softmax(0), made.end_logits[0].log_softmax(0))
    return -(logs[0][item.span[0]] + logs[1][item.span[1]]) / 2


def choice_loss(model: Any, item: Any) -> torch.Tensor:
    scores = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in item.rows])
    return -scores.log_softmax(0)[item.label]


def pair_loss(model: Any, pair: Any) -> torch.Tensor:
    """DPO's, with beta 0.1: −log σ(β (log π/π_ref of the chosen answer − that of the rejected one))."""
    own = [-causal_loss(model, answer) for answer in pair.answers]
    with model.disable_adapter() if isinstance(model, peft.PeftModel) else base_alone(model):
        reference = [-causal_loss(model, answer) for answer in pair.answers]
    return -F.logsigmoid(0.1 * ((own[0] - reference[0]) - (own[1] - reference[1])))


def pairs() -> list[dict[str, Any]]:
    return [
        row | {"chosen": row.pop("completion"), "rejected": "pears" * (i % 3) + "!"}
        for i, row in enumerate(tiny_lm.rows())
    ]


def rows_in(rows: list[dict[str, Any]]) -> Callable[[Path], Path]:
    return lambda folder: tiny_lm.write_rows(folder / "own.jsonl", rows)


def in_peft(base: Any, result: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, result).eval()


def classifier(base: str, result: Path) -> Any:
    names = json.loads((result / "lorakit.json").read_text())["data"]["labels"]
    torch.manual_seed(99)  # the head that PEFT replaces is another one in each process
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(names), id2label=dict(enumerate(names))
    )
    model.config.pad_token_id = tiny_lm.PAD
    return in_peft(model, result)


def headed_by(auto_class: Any, **changes: Any) -> Callable[[str, Path], Any]:
    """A result on the base's class with a head of one output or with the result's own labels, as PEFT loads it."""

    def tuned(base: str, result: Path) -> Any:
        names = json.loads((result / "lorakit.json").read_text())["data"].get("labels")
        own = changes | ({"num_labels": len(names), "id2label": dict(enumerate(names))} if names else {})
        torch.manual_seed(99)
        model = auto_class.from_pretrained(base, **own)
        model.config.pad_token_id = tiny_lm.PAD
        return in_peft(model, result)

    return tuned


def measured_rows() -> list[dict[str, Any]]:
    return [
        {"text": f"{name} sees {'very ' * (i % 3)}{what}", "label": 0.5 + i % 4}
        for i, name in enumerate(tiny_lm.NAMES)
        for what in ("little", "a winding road")
    ]


def tagged_rows() -> list[dict[str, Any]]:
    kinds = {"sees": "O", "tea": "B-THING", "sand": "B-THING", "and": "O"}
    texts = [[name, "sees", *(["tea", "and", "sand"][: 1 + 2 * (i % 2)])] for i, name in enumerate(tiny_lm.NAMES)]
    return [{"tokens": words, "tags": [kinds.get(word, "B-NAME") for word in words]} for words in texts]


def question_rows() -> list[dict[str, Any]]:
    made = []
    for i, name in enumerate(tiny_lm.NAMES):
        context = f"{'So ' * (i % 3)}[{name}] sees tea."  # a decoder's state at "[" knows nothing of what follows
        answers = {"text": [f"[{name}]"], "answer_start": [context.index("[")]}
        made.append({"question": "Who?", "context": context, "answers": answers})
    return made


def choice_rows() -> list[dict[str, Any]]:
    made = []
    for i, name in enumerate(tiny_lm.NAMES):
        choices = [f"{what}{end}" for what, end in zip(("tea", "a road", "sand", "it"), "!...", strict=True)]
        made.append({"question": f"{name}?", "choices": choices[i % 4 :] + choices[: i % 4], "answer": "tea!"})
    return made


def picture_loss(model: Any, item: Any) -> torch.Tensor:
    return -model(tiny_vision.pixels_of(item.image())).logits[0].log_softmax(0)[item.label]


def speech_loss(model: Any, item: Any) -> torch.Tensor:
    """By transformers' own shift of labels, with the tokens before the text left out of the sum."""
    processor = tiny_speech.processor()
    with wave.open(io.BytesIO(item.sound.read())) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15
    features = processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
    processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    labels = torch.tensor([processor.tokenizer(item.text).input_ids[1:]])  # without the start of the transcript
    logits = model(input_features=features, labels=labels).logits[0]
    return F.cross_entropy(logits[3:], labels[0, 3:], reduction="sum")


def visual_loss(model: Any, item: Any) -> torch.Tensor:
    pixels = torch.cat([tiny_vision.pixels_of(image) for image in item.images()])
    logits = model(input_ids=torch.tensor([item.ids]), pixel_values=pixels).logits[0, :-1]
    losses = F.cross_entropy(logits, torch.tensor(item.ids[1:]), reduction="none")
    return losses[torch.tensor(item.trained[1:])].sum()


def vision_classifier(base: str, result: Path) -> Any:
    names = json.loads((result / "lorakit.json").read_text())["data"]["labels"]
    torch.manual_seed(99)
    return in_peft(AutoModelForImageClassification.from_pretrained(base, num_labels=len(names), **AS_SAVED), result)


def labelled_rows() -> list[dict[str, Any]]:
    ends = {"good": "!", "bad": ".", "plain": "?"}
    return [
        {"text": f"{name} sees {what}{end}", "label": label}
        for name in tiny_lm.NAMES
        for label, end in ends.items()
        for what in ("tea", "the winding road")
    ]


@torch.no_grad()
def denoising_loss(pipe: Any, item: Any) -> torch.Tensor:
    """The mean squared error of the noise that the UNet predicts, at the middle of each quartile of the timesteps."""
    pipe, item = getattr(pipe, "pipe", pipe), item.item
    latents = pipe.vae.encode(item.pixels()[None]).latent_dist.mode() * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer(item.caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    embeds = pipe.text_encoder(ids.input_ids)[0]
    chance, errors = torch.Generator().manual_seed(int(item.content[:15], 16)), []
    for t in torch.tensor([125, 375, 625, 875]):
        noise = torch.randn(latents.shape[1:], generator=chance)[None]
        noised = pipe.scheduler.add_noise(latents, noise, t[None])
        errors.append((pipe.unet(noised, t, encoder_hidden_states=embeds).sample - noise).square().mean())
    return torch.stack(errors).mean()


def fixed_losses_of(job: Any, items: Any) -> torch.Tensor:
    batch = job.task.collate(items, job.base)
    seeds = [int(row.item.content[:15], 16) for row in items]
    with evaluating(job.model):
        return fixed_losses(job.model, batch["latents"], batch["prompts"], batch["of"].diffusion, seeds).mean(1)


def in_diffusers(base: str, result: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(result)
    return pipe


AS_SAVED = {"ignore_mismatched_sizes": True}  # the base's own head is for other labels


def target_loss(model: Any, item: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([item.ids]), labels=torch.tensor([item.target])).loss * len(item.target)


def both_sides(made: Any) -> tuple[int, float]:
    source, target = made["input_ids"].shape[1], made["labels"].shape[1]
    return source + target, target / (source + target)


def cosine_loss(model: Any, item: Any) -> torch.Tensor:
    first, second = (model(torch.tensor([text])).last_hidden_state[0].mean(0) for text in item.texts)
    return (F.cosine_similarity(first, second, dim=0) - item.score) ** 2


LABELLED = labelled_rows()
SCORED = [
    {"text": f"{name} sees {what}", "text_pair": f"{name} {verb} {what} now", "score": score}
    for name in tiny_lm.NAMES
    for verb, score in (("sees", 4.5), ("hates", 1.0))
    for what in ("tea", "the winding road")
]
KINDS = {
    "causal_lm": Kind(
        rows_in(tiny_lm.rows()),
        len(tiny_lm.rows()),
        causal_loss,
        lambda base, result: in_peft(AutoModelForCausalLM.from_pretrained(base), result),
    ),
    "classification": Kind(rows_in(LABELLED), len(LABELLED), label_loss, classifier),
    "embeddings": Kind(
        rows_in(SCORED),
        len(SCORED),
        cosine_loss,
        lambda base, result: in_peft(AutoModel.from_pretrained(base), result),
        planned=lambda made: (2 * made["input_ids"].shape[1], 1.0),
    ),
    "image_classification": Kind(
        lambda folder: tiny_vision.write_folders(folder / "own", 24, ((24, 24), (16, 16))),
        24,
        picture_loss,
        vision_classifier,
        model="vision_folder",
        changes={"sample_tokens": 64, "labels": list(tiny_vision.COLOURS)},
    ),
    "multiple_choice": Kind(
        rows_in(choice_rows()), 12, choice_loss, headed_by(AutoModelForSequenceClassification, num_labels=1)
    ),
    "preference": Kind(
        rows_in(pairs()),
        len(tiny_lm.rows()),
        pair_loss,
        lambda base, result: in_peft(AutoModelForCausalLM.from_pretrained(base), result),
    ),
    "question_answering": Kind(
        rows_in(question_rows()),
        12,
        span_loss,
        headed_by(AutoModelForQuestionAnswering, key_mapping={r"^model\.": "transformer."}),
    ),
    "regression": Kind(
        rows_in(measured_rows()), 24, number_loss, headed_by(AutoModelForSequenceClassification, num_labels=1)
    ),
    "seq2seq": Kind(
        rows_in(tiny_seq.pairs()),
        len(tiny_seq.pairs()),
        target_loss,
        lambda base, result: in_peft(AutoModelForSeq2SeqLM.from_pretrained(base), result),
        model="t5_folder",
        planned=both_sides,
    ),
    "speech": Kind(
        lambda folder: tiny_speech.write_rows(folder / "own"),
        24,
        speech_loss,
        lambda base, result: in_peft(AutoModelForSpeechSeq2Seq.from_pretrained(base), result),
        model="speech_folder",
        changes={"language": "en"},
    ),
    "text_to_image": Kind(
        lambda folder: tiny_pictures.write_pictures(folder / "own", 12, ((24, 24), (16, 16))),
        12,
        denoising_loss,
        in_diffusers,
        ("pytorch_lora_weights.safetensors", "lorakit.json"),
        fixed_losses_of,
        "pipeline_folder",
        changes={
            "sample_steps": 2,
            "sample_tokens": 64,
            "resolution": 24,
            "save_as": "diffusers",
        },  # the same name for any folder
    ),
    "token_classification": Kind(
        rows_in(tagged_rows()), 12, tags_loss, headed_by(AutoModelForTokenClassification), losses=losses_without_chance
    ),
    "vision_language": Kind(
        lambda folder: tiny_visual.write_rows(folder / "own"),
        24,
        visual_loss,
        lambda base, result: in_peft(AutoModelForImageTextToText.from_pretrained(base), result),
        model="visual_folder",
    ),
}


@pytest.fixture(params=task_names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return tiny_pictures.save_pipeline(tmp_path_factory.mktemp("tiny-pipeline") / "sd1")


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    """A base that takes pictures of any size."""
    return tiny_vision.save(tmp_path_factory.mktemp("tiny-vision") / "convnext", tiny_vision.convnext(), resize=False)


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory):
    return tiny_speech.save(tmp_path_factory.mktemp("tiny-speech") / "whisper")


@pytest.fixture(scope="module")
def visual_folder(tmp_path_factory):
    return tiny_visual.save(tmp_path_factory.mktemp("tiny-visual") / "llava")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("tiny-t5") / "t5", tiny_seq.t5(dropout_rate=0.0))


@pytest.fixture
def make(request, make_config, tmp_path, name):
    """`make(**changes)`: a short run's config for the task."""
    kind = KINDS[name]
    own = {"model": request.getfixturevalue(kind.model)} if kind.model else {}
    return lambda **changes: make_config(
        **{"task": name, "data": kind.write(tmp_path), **own, **kind.changes} | changes
    )


def test_every_task_has_a_row_here():
    assert KINDS.keys() == set(task_names())


def test_every_task_defines_all_names_of_the_interface(name):
    names = [*Task.__annotations__, *(n for n, value in vars(Task).items() if callable(value) and n[0] != "_")]
    assert len(names) > 40
    missing = [n for n in names if not hasattr(task_of(name), n) and n not in ("to_predict", "predict")]
    assert missing == []


def test_a_runs_config_has_its_settings_and_takes_pefts_name_for_it(name):
    task = task_of(name)
    assert set(task.settings.model_fields) <= set(TrainConfig.model_fields)
    first = task_for(task.peft_type)  # of those with this type: SEQ_CLS is classification, regression has it too
    assert task_of(first).peft_type == task.peft_type
    assert TrainConfig(data="rows.jsonl", task=task.peft_type).task == first
    assert task_of_adapter(task.peft_type, {"recipe": {"task": name}}) == name
    config = TrainConfig(data="rows.jsonl", task=name)
    assert TrainConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


def test_items_say_what_they_cost_and_what_they_are(make, name):
    job = set_up(make())
    items = [*job.train, *job.held_out]
    assert len(items) == KINDS[name].count
    assert all(item.size >= 1 and item.weight >= 1 and "own" in item.where for item in items)
    assert all(isinstance(hash(item.group), int) for item in items)
    assert len({item.digest() for item in items}) == len(items)
    assert fingerprint(items) != fingerprint(items[::-1])
    assert not {item.split_key for item in job.train} & {item.split_key for item in job.held_out}


def test_the_loss_of_a_row_is_the_same_whatever_shares_its_batch_and_as_computed_by_hand(make, name):
    job, kind = set_up(make()), KINDS[name]
    ordered = sorted(job.train, key=lambda item: item.size)[:: len(job.train) // 5]
    assert ordered[0].size < ordered[-1].size
    for group in dict.fromkeys(item.group for item in ordered):
        own = [item for item in ordered if item.group == group]
        items = [job.task.drawn(item, 0, 0) for item in own]
        together = kind.losses(job, items)
        assert together.shape == (len(items),)
        assert together.dtype == torch.float32
        assert job.task.losses(job.model, job.task.collate(items, job.base)).shape == (len(items),)
        for item, row, loss in zip(own, items, together, strict=True):
            (alone,) = kind.losses(job, [row])
            torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(loss, kind.loss(job.model, item), rtol=1e-4, atol=1e-5)


def test_evaluation_has_the_loss_of_training_first(make, name):
    job = set_up(make())
    job.model.train()
    measured = job.task.evaluate(job.base, job.held_out, 3)
    rows = [job.task.drawn(item, 0, 0) for item in job.held_out]
    losses = torch.cat([KINDS[name].losses(job, [row]) for row in rows])
    assert next(iter(measured)) == "loss"
    assert measured["loss"] == pytest.approx(float(losses.detach().sum()) / weight_of(rows), rel=1e-5)
    assert job.model.training
    for batch_size in (1, 64):
        assert job.task.evaluate(job.base, job.held_out, batch_size) == pytest.approx(measured, rel=1e-4)


def test_a_batch_is_planned_as_it_is_made(make, name):
    config = make()
    job = set_up(config)
    if not job.task.traced:
        estimate = static_estimate(config, torch.float32, "default", 0)
        assert estimate.trained == sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        assert estimate.parameters + estimate.trained == sum(p.numel() for p in job.model.parameters())
        assert estimate.parts["optimizer"] == 8 * estimate.trained
        return
    made = job.task.collate(job.train[:2], job.base)
    planned = job.task.example(2, *KINDS[name].planned(made))
    shapes = [
        {n: (t.shape, t.dtype) if isinstance(t, torch.Tensor) else type(t) for n, t in each.items()}
        for each in (planned, made)
    ]
    assert shapes[0] == shapes[1]
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
        ema=0.5,
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
    for file in KINDS[name].files:
        assert (whole.adapter / file).read_bytes() == (resumed.adapter / file).read_bytes()


def test_its_adapter_computes_the_same_in_other_programs(make, name):
    kind, config = KINDS[name], make(steps=4, learning_rate=2e-2, patience=0, eval_every=4)
    result = train(config, QUIET)
    job = set_up(config)
    items = job.train[:6]
    ours = torch.cat([kind.losses(job, [job.task.drawn(item, 0, 0)]) for item in items])
    assert job.config.method == "lora"
    theirs = kind.tuned(config.model, result.adapter)
    found = torch.stack([kind.loss(theirs, item) for item in items])
    assert not torch.allclose(found, ours, atol=1e-3)  # a run that was just set up has not learnt
    Run(job, QUIET)  # takes it up where it ended
    job.model.eval()
    ours = torch.cat([kind.losses(job, [job.task.drawn(item, 0, 0)]) for item in items])
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    if (result.adapter / "adapter_config.json").exists():
        written = json.loads((result.adapter / "adapter_config.json").read_text())
        known = task_of(name).peft_type in list(peft.TaskType)  # it refuses others
        assert written["task_type"] == (task_of(name).peft_type if known else None)


def test_samples_one_for_each_prompt_are_written_and_read(make, name, tmp_path):
    short = {"sample_tokens": 3} if "sample_tokens" in task_of(name).settings.model_fields else {}
    job = set_up(make(**short))
    prompts = job.task.prompts(job.config, job.base, job.data)
    samples = job.task.samples(job.config, job.base, prompts)
    assert [sample.prompt for sample in samples] == [prompt.text for prompt in prompts]
    if samples:
        shown = job.task.read_samples(job.task.write_samples(tmp_path / "samples", 5, samples, samples))
        assert len(shown.texts) == len(prompts) or shown.picture.startswith(b"\x89PNG")
    assert isinstance(job.base, Base)


def test_prompts_with_their_answers_are_for_tasks_that_write(make, name):
    job = set_up(make())
    found = job.task.asked(job.base, job.train)
    assert bool(found) == job.task.writes
    assert all(each.ids and each.text and each.references and "own" in each.where for each in found)
    assert job.task.writes <= ("sample_tokens" in job.task.settings.model_fields)


def test_every_row_is_predicted_in_its_place_whatever_shares_its_batch(make, name):
    """Or the task says which command to use instead."""
    config = make(**({"sample_tokens": 4} if task_of(name).writes else {}))
    job = set_up(config)
    items, found, said = [], None, ""
    try:
        items = job.task.to_predict(config, job.base.processor)
        found = job.task.predict(config, job.base, items, 5)
    except ConfigError as error:
        said = str(error)
    if found is None:
        assert "lorakit" in said
        return
    assert len(found) == len(items) == KINDS[name].count
    assert all("own" in item.where for item in items)
    assert json.loads(json.dumps(found)) == found
    for i in (0, len(items) // 2, len(items) - 1):
        (alone,) = job.task.predict(config, job.base, [items[i]], 1)
        assert alone.keys() == found[i].keys()
        assert all(alone[key] == found[i][key] for key in alone if isinstance(alone[key], str))
