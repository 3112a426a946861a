"""Time the pipeline's own call up to its scheduler's step (`bases.catching`) against the bare UNet.

    python -m lorakit.bench.pipeline_call [--rounds 20]

The embedded pipeline with a rank-8 adapter on its attention, forward and backward, prompts encoded beforehand.
Interleaved in one process; CPU time, and the median ratio of pairs.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

import lorakit as lk

from ..bases.load import EMBEDDED
from ..bases.load_pipeline import load_pipeline
from ..bases.pipeline import as_module
from ..tasks.image.packing import layout_of
from ..tasks.image.prompts import batch_prompts, encode_prompts
from .measure import cpu_and_wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    pipe = load_pipeline(EMBEDDED, torch.float32, torch.device("cpu"))
    lk.attach(pipe, lk.LoraConfig(rank=8, targets="attention"))
    print("batch    UNet, ms    pipeline, ms    ratio")
    for rows in (4, 16):
        bare, called = measured(pipe, rows, rounds)
        ratio = median(c / b for b, c in zip(bare, called))
        print(f"{rows:>5} {1e3 * median(bare):>11.1f} {1e3 * median(called):>15.1f} {ratio:>8.3f}")


def measured(pipe: Any, rows: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of forward and backward in each round: of the UNet, and of the pipeline's call."""
    model, config = as_module(pipe), pipe.unet.config
    latents = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
    t = torch.randint(0, 1000, (rows,))
    prompts = batch_prompts(encode_prompts(pipe, ["a fox at sea"]) * rows)
    layout = layout_of(model, latents, prompts)

    def bare() -> None:
        pipe.unet(latents, t, prompts["prompt_embeds"], return_dict=False)[0].square().mean().backward()

    def called() -> None:
        model(layout.argument(latents), t, **prompts, **layout.call).output.square().mean().backward()

    times = cpu_and_wall({"bare": bare, "called": called}, rounds)
    return [cpu for cpu, _ in times["bare"]], [cpu for cpu, _ in times["called"]]


if __name__ == "__main__":
    main()
