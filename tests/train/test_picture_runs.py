"""Runs of task text_to_image: they learn, resume exactly after SIGKILL, and their result loads in diffusers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny_pictures
import tiny_pipelines
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import draw

import lorakit as lk
from lorakit.bases.load_pipeline import load_pipeline
from lorakit.errors import LorakitError, TrainError
from lorakit.generate.pictures.generate import generate_pictures
from lorakit.generate.pictures.png_text import read_png
from lorakit.tasks.image.encoded import Pictures
from lorakit.train.micro import limit_for, micro_batches
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.find_lr import find
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pictures.save_pipeline(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_pictures.write_pictures(tmp_path_factory.mktemp("pictures"), 7, ((16, 16), (24, 16)))


@pytest.fixture
def make(model, pictures, tmp_path):
    """`make(**changes)`: a short run's config."""
    places = {"model": model, "data": pictures, "out": tmp_path / "run"}
    return lambda **changes: tiny_pictures.config(**places | changes)


def weights(folder: Path) -> Path:
    [file] = folder.glob("*.safetensors")
    return file


def test_a_run_writes_one_file_that_diffusers_places_wholly_and_draws_the_same_with(make, model):
    config = make(components=["unet", "text_encoder"], steps=6, learning_rate=2e-2)
    result = train(config, QUIET)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    pipe.load_lora_weights(result.adapter)
    placed = [
        name for part in (pipe.unet, pipe.text_encoder) for name, _ in part.named_parameters() if "lora_A" in name
    ]
    written = json.loads((result.adapter / "lorakit.json").read_text())
    assert len(placed) == written["placed"]["unet"] + written["placed"]["text_encoder"] > 0
    theirs = draw(pipe)
    assert not torch.allclose(theirs, before, atol=1e-3)


def masks_of(pictures: Path, folder: Path) -> Path:
    """A mask for each picture: its left half."""
    folder.mkdir()
    for path in pictures.glob("*.png"):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / path.name)
    return folder


def test_loha_is_trained_on_attention_and_convolutions_and_written_as_lycoris_has_it(make):
    config = make(variant="loha", targets="locon", steps=6, learning_rate=2e-2)
    result = train(config, QUIET)
    written = lk.Adapter.load(result.adapter)
    assert {update.variant for update in written.updates.values()} == {"loha"}
    assert any(key.endswith("hada_w1_a") for key in load_file(weights(result.adapter)))
    base = load_pipeline(config.model, torch.float32, torch.device("cpu"))
    before = draw(base)
    assert not torch.allclose(draw(lk.attach(base, written)), before, atol=1e-3)


def test_dora_is_trained_on_attention_and_convolutions_and_written_with_its_magnitudes(make):
    config = make(variant="dora", targets="locon", steps=6, learning_rate=2e-2)
    result = train(config, QUIET)
    written = lk.Adapter.load(result.adapter)
    assert {update.variant for update in written.updates.values()} == {"dora"}
    assert {factors.kind for factors in written.factors.values()} == {"linear", "conv"}
    assert any(key.endswith("dora_scale") for key in load_file(weights(result.adapter)))
    base = load_pipeline(config.model, torch.float32, torch.device("cpu"))
    before = draw(base)
    assert not torch.allclose(draw(lk.attach(base, written)), before, atol=1e-3)


def test_a_run_killed_twice_at_step_7_of_20_ends_with_the_bits_of_one_that_was_not(make, pictures, tmp_path):
    config = partial(
        make,
        steps=20,
        eval_every=5,
        save_every=3,
        components=["unet", "text_encoder"],
        text_encoder_learning_rate=1e-3,
        ema=0.9,
        validation=0.2,
        prior_caption="a cat",
        prior_count=4,
        flip=True,
        caption_dropout=0.3,
        min_snr=5,
        noise_offset=0.05,
        targets="locon",
        gradient_checkpointing=True,
        crop="random",
        new_tokens={"<kin>": "cat"},
        trigger="<kin>",
        mask=str(masks_of(pictures, tmp_path / "masks")),
    )
    whole, killed = (
        config(out=tmp_path / "whole/run"),
        config(out=tmp_path / "killed/run"),
    )  # the file has the run's name
    train(whole, QUIET)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump()))
    command = [sys.executable, str(Path(__file__).with_name("killed_at_step.py")), str(file), "7", "2"]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert json.loads(done.stdout) == [-9, -9, 0], done.stderr
    ours, theirs = RunFolder(whole.out), RunFolder(killed.out)
    for name in (weights(ours.adapter).name, "lorakit.json"):
        first, second = ((folder.adapter / name).read_bytes() for folder in (ours, theirs))
        assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()
    for path in sorted(ours.samples.rglob("*.png")):
        assert path.read_bytes() == (theirs.samples / path.relative_to(ours.samples)).read_bytes()

    def without_time(folder):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()]

    assert without_time(ours) == without_time(theirs)


def test_prior_pictures_are_drawn_once_all_are_used_and_their_loss_is_logged_apart(make):
    config = make(prior_caption="a cat", prior_count=5, prior_weight=0.5, steps=4, batch_size=7)
    train(config, QUIET)
    folder = RunFolder(config.out)
    drawn = {path: path.stat().st_mtime_ns for path in (folder.path / "prior").glob("*/*.png")}
    assert len(drawn) == 5
    rows = [row for row in folder.rows() if "loss" in row]
    assert sum("prior_loss" in row for row in rows) >= 2
    job = set_up(config)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert job.data.rows == 14  # as many of the class as pictures
    used = [row for step in range(4) for row in job.batch(step) if row.is_prior]
    assert {row.item.content for row in used} == {row.item.content for row in job.train if row.is_prior}
    assert {row.drawn.caption for row in used} == {"a cat"}


def test_the_weight_of_prior_pictures_scales_their_loss(make):
    job = set_up(make(prior_caption="a cat", prior_count=1, prior_weight=0.25))
    prior = next(row for row in job.train if row.is_prior)
    torch.manual_seed(0)
    weighted = job.task.losses(job.model, job.task.collate([prior], job.base))
    own = dataclasses.replace(prior, item=dataclasses.replace(prior.item, is_prior=False))
    torch.manual_seed(0)
    plain = job.task.losses(job.model, job.task.collate([own], job.base))
    torch.testing.assert_close(weighted, 0.25 * plain)


def test_without_held_out_pictures_training_ones_are_evaluated_and_the_base_is_step_0(make):
    config = make(steps=4, learning_rate=2e-2)
    train(config, QUIET)
    evaluations = [row for row in RunFolder(config.out).rows() if "fixed_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert evaluations[0]["fixed_loss"] == pytest.approx(
        sum(evaluations[0][f"fixed_loss_q{n}"] for n in (1, 2, 3, 4)) / 4, abs=1e-5
    )
    assert evaluations[-1]["fixed_loss"] < evaluations[0]["fixed_loss"]
    job = set_up(config.replace(out=config.out + "-fresh"))  # its factors B are zero
    measured = job.task.evaluate(job.base, job.data.watched, 3)
    assert round(measured["loss"], 5) == evaluations[0]["fixed_loss"]
    assert job.task.evaluate(job.base, job.data.watched, 3) == measured


def test_cached_latents_and_captions_are_those_that_are_encoded_anew_to_the_bit(make, tmp_path):
    cached, plain = (make(cache=cache, flip=True, out=tmp_path / f"run-{cache}") for cache in ("none", "auto"))
    first, second = (train(config.replace(steps=3), QUIET).adapter for config in (cached, plain))
    assert weights(first).read_bytes()[-1000:] == weights(second).read_bytes()[-1000:]


def test_a_mask_says_where_the_loss_counts(make, pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            Image.new("L", image.size, 255 if path.stem < "03" else 0).save(masks / path.name)
    job = set_up(make(mask=str(masks)))
    rows = [row for row in job.train if row.group == job.train[0].group]
    losses = job.task.losses(job.model, job.task.collate(rows, job.base))
    for row, loss in zip(rows, losses.tolist(), strict=True):
        assert (loss > 0) == (Path(row.where).stem < "03")


def test_a_text_encoder_learns_at_its_own_rate_and_both_rates_are_logged(make):
    config = make(components=["unet", "text_encoder"], text_encoder_learning_rate=1e-4, learning_rate=1e-3, steps=3)
    train(config, QUIET)
    for row in RunFolder(config.out).rows():
        if "loss" in row:
            assert row["learning_rate_text_encoder"] == pytest.approx(row["learning_rate"] / 10)


def test_the_average_of_the_parameters_is_what_is_saved_and_sampled(make, tmp_path):
    plain, averaged = (
        train(make(ema=ema, steps=6, out=tmp_path / str(ema), learning_rate=1e-2), QUIET) for ema in (0.0, 0.9)
    )
    ours, theirs = (lk.Adapter.load(result.adapter).digest() for result in (plain, averaged))
    assert ours != theirs
    checkpoint = RunFolder(tmp_path / "0.9").checkpoints / "step-6"
    trained, ema = (load_file(checkpoint / f"{name}.safetensors") for name in ("trainable", "ema"))
    assert trained.keys() == ema.keys()
    assert any(not torch.equal(trained[name], ema[name]) for name in trained)
    unaveraged = load_file(RunFolder(tmp_path / "0.0").checkpoints / "step-6" / "trainable.safetensors")
    assert all(torch.equal(trained[name], unaveraged[name]) for name in trained)


def test_learned_words_are_in_the_file_beside_the_adapter(make, model, tmp_path):
    config = make(new_tokens={"<dog>": "cat"}, token_vectors=2, steps=3, trigger="<dog>", learning_rate=1e-2)
    result = train(config, QUIET)
    adapter = lk.Adapter.load(result.adapter)
    (vectors,) = adapter.embeddings.values()
    assert vectors.shape == (2, 12)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer("cat").input_ids[1]]
    assert not torch.equal(vectors[0], start)
    torch.testing.assert_close(vectors[0], start, atol=0.1, rtol=0)


def test_a_slider_is_trained_without_pictures(make):
    config = make(data="none", slider_positive="a red cat", slider_negative="a dog", slider_steps=2, steps=3)
    result = train(config, QUIET)
    assert lk.Adapter.load(result.adapter).factors
    losses = [row["loss"] for row in RunFolder(config.out).rows() if "loss" in row]
    assert len(losses) == 3
    assert min(losses) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "rank": 16}, "method: full: task text_to_image trains adapters"),
        ({"compile": True}, "compile: task text_to_image does not have it"),
        ({"prior_count": 3}, "prior_count: say what to draw"),
        ({"new_tokens": {"<dog>": ""}}, "'<dog>' is in none of 7 captions"),
        ({"slider_positive": "a cat"}, "a slider is trained from prompts"),
        ({"save_as": "kohya", "targets": ["time_emb_proj"], "min_snr": 5}, None),
        ({"find_lr": True, "learning_rate": "auto", "new_tokens": {"<x>": ""}}, "task: text_to_image"),
        ({"model": "tests"}, "model_index.json is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(make, changes, message):
    if message is None:
        assert train(make(**changes), QUIET).adapter is not None
        return
    with pytest.raises(LorakitError, match=re.escape(message)):
        train(make(**changes), QUIET)


def test_gradient_checkpointing_changes_no_bit(make, tmp_path):
    plain, saving = (
        train(
            make(
                gradient_checkpointing=on,
                components=["unet", "text_encoder"],
                steps=3,
                sample_steps=0,
                out=tmp_path / str(on),
            ),
            QUIET,
        )
        for on in (False, True)
    )
    ours, theirs = (lk.Adapter.load(result.adapter) for result in (plain, saving))
    for module, update in ours.updates.items():
        for name, tensor in update.tensors().items():
            torch.testing.assert_close(tensor, theirs.updates[module].tensors()[name], atol=1e-6, rtol=1e-4)


def test_samples_say_in_the_png_what_they_were_drawn_from_and_the_report_shows_the_grid(make):
    config = make(sample_prompts=["a red cat"], sample_seed=5, sample_guidance=2.0, steps=4)
    train(config, QUIET)
    folder = RunFolder(config.out)
    assert [step for step, _ in folder.sampled()] == [2, 4]
    sample = read_png(folder.samples / "step-4" / "1.png")
    assert (sample.prompt, sample.seed, sample.guidance, sample.steps) == ("a red cat", 5, 2.0, 2)
    assert (sample.sampler, sample.precision, sample.model) == ("DDIM", "fp32", "sd1")
    assert sample.version.startswith("lorakit ")
    assert list(sample.loras) == ["adapter"]
    assert not read_png(folder.samples / "step-0" / "1.png").loras
    assert "data:image/png;base64," in folder.report.read_text()
    # drawn again with the file that the checkpoint holds
    pipe = load_pipeline(config.model, torch.float32, torch.device("cpu"))
    lk.attach(pipe, lk.Adapter.load(folder.checkpoints / "step-4"))
    (picture,) = generate_pictures(pipe, ["a red cat"], seed=5, steps=2, guidance=2.0)
    with Image.open(folder.samples / "step-4" / "1.png") as written:
        assert list(written.convert("RGB").getdata()) == list(picture.getdata())


def test_pictures_of_five_shapes_are_each_seen_once_an_epoch_and_never_beside_another_shape(make, tmp_path):
    sizes = ((16, 16), (24, 16), (16, 24), (32, 16), (16, 32))
    data = tiny_pictures.write_pictures(tmp_path / "shapes", 7, sizes)
    job = set_up(make(data=data, batch_size=4, resolution=24, bucket_step=8))
    assert len({row.group for row in job.train}) > 2
    for epoch in range(2):
        batches = [job.batch(2 * epoch + step) for step in range(2)]
        assert sorted(row.where for batch in batches for row in batch) == sorted(row.where for row in job.train)
    for part in micro_batches([job.batch(0)], limit_for([job])):
        assert len({row.group for row in part.items}) == 1
        job.task.losses(job.model, job.task.collate(part.items, job.base))


def test_sdxl_is_trained_with_two_text_encoders_and_the_sizes_of_pictures(make, tmp_path):
    folder = tmp_path / "sdxl"
    tiny_pipelines.tiny_sdxl().save_pretrained(folder)
    config = make(model=folder, steps=2, precision="bf16", components=["unet", "text_encoder_2"], sample_steps=1)
    job = set_up(config.replace(out=config.out + "-looked-at"))
    prompts = job.task.collate(job.train[:1], job.base)
    assert prompts["prompts"]["prompt"] == [job.train[0].caption]
    assert prompts["prompts"]["target_size"] == job.train[0].group[::-1]
    plain = set_up(make(model=folder, out=tmp_path / "plain"))
    wide = next(row for row in plain.train if row.item.original == (24, 16))
    assert plain.task.collate([wide], plain.base)["prompts"]["target_size"] == wide.group[::-1]
    result = train(config, QUIET)
    placed = json.loads((result.adapter / "lorakit.json").read_text())["placed"]
    assert set(placed) == {"unet", "text_encoder_2"}
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    loaded.load_lora_weights(result.adapter)
    assert "default_0" in loaded.get_list_adapters()["unet"]


def test_a_picture_whose_loss_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(make, monkeypatch):
    config = make(steps=6, save_every=2, sample_steps=0, eval_every=6)
    losses, calls = Pictures.losses, []

    def broken(pictures, model, batch):
        calls.append(1)
        return losses(pictures, model, batch) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(Pictures, "losses", broken)
    with pytest.raises(
        TrainError, match=r"the loss is nan at step \d; nothing was updated, and the last good .*step-[24]"
    ):
        train(config.replace(batch_size=7), QUIET)


def test_runs_of_a_sweep_are_those_that_they_would_be_alone_and_are_ranked_on_fixed_noise(make, tmp_path):
    rates = (1e-4, 2e-2)
    alone = {
        rate: train(make(learning_rate=rate, min_snr=2, out=tmp_path / f"{rate}"), QUIET).adapter for rate in rates
    }
    values = make(min_snr=2, out=tmp_path / "sweep").model_dump(exclude_unset=True) | {"learning_rate": list(rates)}
    outcome = sweep(expand(values, 4), SweepProgress(quiet=True))
    assert outcome.criterion == "the loss of training rows on fixed noise (none were held out)"
    for entry in outcome.entries:
        ours, theirs = (lk.Adapter.load(path).updates for path in (entry.adapter, alone[entry.learning_rate]))
        for module, update in ours.items():
            for name, tensor in update.tensors().items():
                torch.testing.assert_close(tensor, theirs[module].tensors()[name], atol=1e-6, rtol=1e-4)
    assert outcome.entries[0].learning_rate == 2e-2


def test_a_learning_rate_is_found_on_fixed_noise(make):
    config = make(find_lr=True, learning_rate="auto", steps=100, batch_size=2)
    search = find(config, QUIET)
    assert len(search.tried) == 6
    assert all(entry.on_fixed_noise for entry in search.tried)
    assert search.rate in {entry.learning_rate for entry in search.tried}
