"""A very short run of scripts/pretrain_tiny_diffusion.py, from nothing to a pipeline that diffusers loads."""

from __future__ import annotations

import json

import pretrain_tiny_diffusion
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_diffusion.denoiser import denoiser_part
from tiny_diffusion.latents import fit
from tiny_diffusion.loop import checkpoint_file, rate, train
from tiny_diffusion.pipeline import export
from tiny_diffusion.tokenizer import make_tokenizer

from lorakit.formats.names import shapes
from lorakit.reproduce.emoji.judge import load_judge
from lorakit.reproduce.emoji.pictures import scenes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints and pipeline folder of a run of two steps a part, evaluated."""
    folder = tmp_path_factory.mktemp("tiny-diffusion")
    parts = [f"--{name}-steps=2" for name in pretrain_tiny_diffusion.STEPS]
    short = ["--fitted-on=64", "--samples=2", "--sampling-steps=1"]
    where = ["--checkpoint", str(folder / "run"), "--out", str(folder / "out")]
    pretrain_tiny_diffusion.main([*where, *parts, *short, "--parts", "judge", "autoencoder", "denoiser"])
    return folder


@pytest.fixture(scope="module")
def pipeline(made):
    return StableDiffusionPipeline.from_pretrained(made / "out", local_files_only=True)


def test_diffusers_draws_with_the_folder(pipeline):
    pictures = pipeline(["a panda at night", "sks"], num_inference_steps=2, output_type="pt").images
    assert pictures.shape == (2, 3, 32, 32)
    assert pictures.isfinite().all()
    assert pipeline.scheduler.alphas_cumprod[-1] == 0  # zero terminal signal-to-noise ratio
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_the_folder_is_small_and_half_precision(made):
    assert sum(path.stat().st_size for path in (made / "out").rglob("*") if path.is_file()) < 10e6
    config = json.loads((made / "out" / "model_index.json").read_text())
    assert config["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert (made / "out" / "tokenizer" / "merges.txt").exists()


def test_module_names_are_those_of_stable_diffusion(pipeline):
    known = shapes("sd1")
    # transformers 5 dropped a level that Stable Diffusion's files have; the list names no embeddings
    parts = {"unet.": (pipeline.unet, 116), "text_encoder.text_model.": (pipeline.text_encoder, 19)}
    for level, (component, count) in parts.items():
        weighted = [name for name, module in component.named_modules() if getattr(module, "weight", None) is not None]
        assert len(weighted) == count
        assert not [name for name in weighted if level + name not in known and not name.startswith("embeddings.")]


def test_judge_table_and_grids_are_written(made):
    out = made / "out"
    measures = json.loads((out / "evaluation.json").read_text())
    for row in ("seen pairs", "pairs never seen", "real pictures"):
        assert 0 <= measures[row]["object"] <= 1
    assert measures["autoencoder, dB"]["scenes"] > 0
    for name in ("samples.png", "objects.png"):
        with Image.open(out / name) as grid:
            assert min(grid.size) > 400
    text = (out / "README.md").read_text(encoding="utf8")
    assert f"| seen pairs | {measures['seen pairs']['object']:.1%} |" in text
    assert "autoencoder 2, judge 2" in text
    things, backgrounds = load_judge(out / "judge")(torch.zeros(1, 3, 32, 32))
    assert (things.shape[1], backgrounds.shape[1]) == (72, 16)


def test_evaluate_alone_gives_the_same_table(made, capsys):
    before = (made / "out" / "evaluation.json").read_bytes()
    pretrain_tiny_diffusion.main(["--evaluate", "--out", str(made / "out"), "--samples=2", "--sampling-steps=1"])
    assert (made / "out" / "evaluation.json").read_bytes() == before
    assert "| pairs never seen |" in capsys.readouterr().out


def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    projection = fit(scenes("projection", 0, 64).pictures)

    def part(killed_at: int | None = None):
        made = denoiser_part(make_tokenizer(), projection, rows=2)
        loss = made.loss

        def mortal(step):
            if step == killed_at:
                raise KeyboardInterrupt
            return loss(step)

        made.loss = mortal
        return made

    assert train(part(), tmp_path / "unbroken", steps=5)
    with pytest.raises(KeyboardInterrupt):
        train(part(killed_at=3), tmp_path / "killed", steps=5, save_every=2)
    assert not train(part(), tmp_path / "killed", steps=5, minutes=0)  # no time: stays where it is
    assert train(part(), tmp_path / "killed", steps=5)
    one, other = (
        torch.load(checkpoint_file(tmp_path / name, "denoiser"), weights_only=True) for name in ("unbroken", "killed")
    )
    assert one["step"] == other["step"] == 5
    for kind in ("model", "average"):
        for name, tensor in one[kind].items():
            assert torch.equal(tensor, other[kind][name]), (kind, name)
    assert one["running"] == other["running"]


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    assert rate(0, 10_000) == 1 / 200
    assert rate(199, 10_000) == rate(6_999, 10_000) == 1
    assert rate(8_500, 10_000) == pytest.approx(0.5)
    assert rate(10_000, 10_000) == 0


def test_export_names_what_is_not_trained_yet(tmp_path, made):
    run = tmp_path / "run"
    run.mkdir()
    (run / "judge.pt").write_bytes((made / "run" / "judge.pt").read_bytes())
    with pytest.raises(SystemExit, match="denoiser, autoencoder"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_pipeline_is_not_evaluated(tmp_path):
    with pytest.raises(SystemExit, match=r"no model_index\.json"):
        pretrain_tiny_diffusion.main(["--evaluate", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_train_side_by_side_in_processes_of_their_own(tmp_path):
    parts = [f"--{name}-steps=1" for name in pretrain_tiny_diffusion.STEPS]
    where = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    pretrain_tiny_diffusion.main([*where, *parts, "--fitted-on=64", "--no-export"])
    for name in pretrain_tiny_diffusion.STEPS:
        assert torch.load(checkpoint_file(tmp_path / "run", name), weights_only=True)["step"] == 1
    assert not (tmp_path / "out").exists()
