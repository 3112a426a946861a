"""A StableDiffusionPipeline folder, in 16 bits, from a run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from lorakit.reproduce.emoji.judge import save_judge

from .autoencoder import new_autoencoder
from .denoiser import new_denoiser, new_scheduler
from .judge import new_judge
from .loop import checkpoint_file, load_average
from .tokenizer import make_tokenizer


def export(run: Path, out: Path) -> None:
    """Writes the pipeline, `judge/` and training.json (the steps that each part had, and its size)."""
    tokenizer = make_tokenizer()
    denoiser, autoencoder, judge = new_denoiser(tokenizer), new_autoencoder(), new_judge()
    models = {"denoiser": denoiser, "autoencoder": autoencoder, "judge": judge}
    missing = [name for name in models if not checkpoint_file(run, name).exists()]
    if missing:
        raise SystemExit(
            f"{run} has no checkpoint of: {', '.join(missing)}\n  train it first: --parts {' '.join(missing)}"
        )
    steps = {name: load_average(model, run, name) for name, model in models.items()}
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser["text_encoder"],
        tokenizer=tokenizer,
        unet=denoiser["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for model in (autoencoder, denoiser, judge):
        model.to(torch.float16, memory_format=torch.contiguous_format)
    pipeline.save_pretrained(out)
    load_in_32_bits(out / "text_encoder" / "config.json")
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))  # vocab.json and merges.txt, for other programs
    save_judge(judge, out / "judge")
    parameters = sum(p.numel() for model in (denoiser, autoencoder) for p in model.parameters())
    (out / "training.json").write_text(
        json.dumps({"steps": steps, "parameters": parameters}, indent=2) + "\n", encoding="utf8"
    )


def load_in_32_bits(config: Path) -> None:
    """Makes 32 bits the text encoder's default, as they are diffusers' for the other components.

    transformers 5 loads in the bits that its config names, and a pipeline with both kinds stops at the first linear.
    """
    settings = json.loads(config.read_text(encoding="utf8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf8")


def load(folder: Path) -> StableDiffusionPipeline:
    """The exported pipeline in 32 bits, for this machine's processor, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def megabytes(folder: Path) -> float:
    """The size of all weights of the pipeline and its judge."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
