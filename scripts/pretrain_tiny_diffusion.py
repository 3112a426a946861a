"""Make the embedded image model: a complete StableDiffusionPipeline of 2.5 million parameters, and a judge for it.

    python scripts/pretrain_tiny_diffusion.py --checkpoint RUN --out lorakit/assets/tiny-diffusion
    python scripts/pretrain_tiny_diffusion.py --evaluate --out lorakit/assets/tiny-diffusion

It learns 48 Twemoji objects on 16 backgrounds, 32 x 32 pixels, from captions like "a small panda in a meadow"
(lorakit/assets/twemoji; nothing else is read). The latent space is a fixed projection, so UNet with text encoder and
autoencoder are trained at the same time, in two processes of one thread each; the judge comes before the autoencoder.
Stopped at any time, it continues from RUN and ends with the same bits (same CPU). After --minutes it stops and exports
what it has; the same command goes on from there. scripts/tiny_diffusion/ says how each part works.

Needs diffusers: pip install 'lorakit[test]'.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion.autoencoder import autoencoder_part
from tiny_diffusion.card import card
from tiny_diffusion.denoiser import denoiser_part
from tiny_diffusion.evaluate import evaluate, table
from tiny_diffusion.judge import judge_part
from tiny_diffusion.latents import FITTED_ON, Projection, fit_to_scenes
from tiny_diffusion.loop import Part, train
from tiny_diffusion.pipeline import export
from tiny_diffusion.tokenizer import make_tokenizer

STEPS = {"denoiser": 28_000, "autoencoder": 16_000, "judge": 1_500}
SIDE_BY_SIDE = (("denoiser",), ("judge", "autoencoder"))


def projection_of(folder: Path, fitted_on: int) -> Projection:
    """The run's projection, fitted when the run is new."""
    path = folder / "projection.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(fit_to_scenes(fitted_on).tensors(), path)
    return Projection(**load_file(path))


def part_of(name: str, projection: Projection) -> Part:
    if name == "denoiser":
        return denoiser_part(make_tokenizer(), projection)
    return {"autoencoder": autoencoder_part, "judge": judge_part}[name](projection)


def train_parts(names: list[str], args: argparse.Namespace) -> None:
    """In this process, one after the other."""
    began = time.monotonic()
    projection = projection_of(args.checkpoint, args.fitted_on)
    for name in names:
        left = None if args.minutes is None else max(0.0, args.minutes - (time.monotonic() - began) / 60)
        train(part_of(name, projection), args.checkpoint, args.steps[name], left)


def train_side_by_side(args: argparse.Namespace, argv: list[str]) -> None:
    """The same command once for each row of SIDE_BY_SIDE, with --parts. If one fails, the others are stopped too."""
    projection_of(args.checkpoint, args.fitted_on)
    command = [sys.executable, __file__, *argv, "--no-export", "--parts"]
    processes = [subprocess.Popen([*command, *names]) for names in SIDE_BY_SIDE]
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(1)
    finally:
        for process in processes:
            process.terminate()
    if any(codes):
        raise SystemExit(f"training failed (exit codes {codes}); what was saved before is in {args.checkpoint}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny-diffusion-run"), help="folder of the run's state")
    parser.add_argument("--minutes", type=float, help="stop training after this time; the same command goes on later")
    parser.add_argument("--parts", nargs="+", choices=list(STEPS), help="train these only, here and one by one")
    parser.add_argument("--no-export", action="store_true", help="train only: leave --out as it is")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: judge --out and draw its sample grid")
    parser.add_argument("--samples", type=int, default=256, help="how many samples of each kind are judged")
    parser.add_argument("--sampling-steps", type=int, default=20, help="denoising steps of a sample (default 20)")
    parser.add_argument("--fitted-on", type=int, default=FITTED_ON, help="pictures that the projection is fitted to")
    for name, steps in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=steps, help=f"default {steps:,}")
    args = parser.parse_args(argv)
    args.steps = {name: getattr(args, f"{name}_steps") for name in STEPS}
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    if not args.evaluate:
        if args.parts:
            train_parts(args.parts, args)
        else:
            train_side_by_side(args, argv)
        if args.no_export:
            return
        export(args.checkpoint, args.out)
        print(f"pipeline written to {args.out}", flush=True)
    if not (args.out / "model_index.json").exists():
        raise SystemExit(f"{args.out} holds no pipeline (no model_index.json)\n  make one: leave --evaluate out")
    measures = evaluate(args.out, args.samples, args.sampling_steps)
    (args.out / "README.md").write_text(card(args.out), encoding="utf8")
    print("\n".join(table(measures)))
    print("autoencoder: " + ", ".join(f"{name} {value:.1f} dB" for name, value in measures["autoencoder, dB"].items()))
    print(f"weights: {measures['weights, MB']:.1f} MB")
    print(f"look at {args.out / 'samples.png'} and {args.out / 'objects.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
