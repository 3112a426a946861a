"""Time a training step of a diffusion UNet with lorakit, and with PEFT as diffusers' own scripts use it.

Both sides train the same UNet on the same batch: its forward, the mean squared error, backward, and AdamW. The floor is
the frozen UNet's forward and its backward to the latents, which every adapter method has to pay. The passes and AdamW
are timed apart, so that the gain of one does not hide the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk

from .measure import PRECISIONS, cpu_and_wall, kept_bytes

TITLE = (
    "A training step (forward, backward, AdamW) of a diffusion UNet with rank 8: lorakit, and diffusers with PEFT. "
    "Each side's AdamW is its own trainer's: fused in lorakit, not so in diffusers' scripts. 'ms': processor time. "
    "'over PEFT': the median ratio of pairs of steps, in processor time and in elapsed time; 'passes': forward and "
    "backward alone, without AdamW; 'floor': those of the frozen UNet, backward to its input; 'kept': bytes kept for "
    "backward."
)
RANK = 8
LATENT_CHANNELS, TOKENS, HEAD_SIZE = 12, 24, 4  # as in the embedded pipeline
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "attention, ff, proj, conv": [
        *ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
        "conv_shortcut",
        "conv",
    ],
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Shape:
    """The widths of a UNet's two levels, and the size of its latents in pixels."""

    widths: tuple[int, int]
    size: int

    def __str__(self) -> str:
        return f"{self.widths[0]},{self.widths[1]} at {self.size}x{self.size}"


SHAPES = (Shape((32, 64), 8), Shape((48, 96), 8), Shape((64, 128), 32))  # the second is the embedded pipeline's


def unet(shape: Shape, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Any:
    """Return a frozen UNet with random weights, whose module names are a subset of Stable Diffusion 1.5's."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=shape.size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=shape.widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=shape.widths[1],
        attention_head_dim=HEAD_SIZE,
        norm_num_groups=16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nn.Module.to(model, device, dtype)  # diffusers' own `to` warns of any dtype
    return model.to(memory_format=LAYOUTS[layout]).train().requires_grad_(False)


def lorakit_side(model: Any, targets: list[str]) -> nn.Module:
    """Attach lorakit's LoRA."""
    return lk.attach(model, lk.LoraConfig(rank=RANK, alpha=RANK, targets=targets))


def peft_side(model: Any, targets: list[str]) -> nn.Module:
    """Add PEFT's LoRA, as diffusers' training scripts do. The factors have the base's dtype, its faster setting."""
    import peft

    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    return model


SIDES: dict[str, Callable[[Any, list[str]], nn.Module]] = {
    "floor": lambda model, _: model,
    "PEFT": peft_side,
    "lorakit": lorakit_side,
}


def batch(shape: Shape, rows: int, model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Return the UNet's arguments and the `target` of its prediction."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like.device, like.dtype)

    latents, target = (
        random(rows, LATENT_CHANNELS, shape.size, shape.size).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return {
        "sample": latents,
        "timestep": torch.randint(0, 1000, (rows,), generator=generator).to(like.device),
        "encoder_hidden_states": random(rows, TOKENS, shape.widths[1]),
        "target": target,
    }


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a forward that gives the loss. For the floor, the latents require a gradient: backward reaches them."""
    target = inputs["target"]
    arguments = {name: t for name, t in inputs.items() if name != "target"}
    if not any(p.requires_grad for p in model.parameters()):
        arguments["sample"] = arguments["sample"].clone().requires_grad_()

    def loss() -> Tensor:
        return F.mse_loss(model(**arguments).sample.float(), target.float())

    return loss


def passes(loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a forward and backward."""
    return lambda: loss().backward()


def optimizer_step(model: nn.Module, name: str) -> Callable[[], None]:
    """Return AdamW's step as the side's own trainer takes it: lorakit's is fused, that of diffusers' scripts is not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if name == "lorakit" else None) if trained else None

    def run() -> None:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


class Times(NamedTuple):
    """Of one side: (processor seconds, elapsed seconds) of every round's forward and backward, and of its optimizer;
    and the bytes kept for backward.
    """

    passes: list[tuple[float, float]]
    optimizer: list[tuple[float, float]]
    kept: int

    def steps(self) -> list[tuple[float, float]]:
        """Return the sums."""
        return [(a + c, b + d) for (a, b), (c, d) in zip(self.passes, self.optimizer, strict=True)]


def measure(
    shape: Shape, rows: int, targets: list[str], layout: str, dtype: torch.dtype, rounds: int
) -> dict[str, Times]:
    """Return each side's times."""
    models = {name: add(unet(shape, dtype, layout), targets) for name, add in SIDES.items()}
    losses = {name: forward(model, batch(shape, rows, model, layout)) for name, model in models.items()}
    kept = {name: kept_bytes(models[name], loss) for name, loss in losses.items()}
    parts: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        parts[name, "passes"] = passes(losses[name])
        parts[name, "optimizer"] = optimizer_step(model, name)
    times = cpu_and_wall(parts, rounds)
    return {name: Times(times[name, "passes"], times[name, "optimizer"], kept[name]) for name in models}


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[dict[str, Any]]:
    """Return a row for each precision, UNet, batch, set of targets and memory layout."""
    shapes, batches, layouts = (SHAPES[:1], (4,), ["contiguous"]) if quick else (SHAPES, (4, 16), list(LAYOUTS))
    rows = []
    for dtype, shape, size, targets, layout in product(precisions, shapes, batches, TARGETS, layouts):
        rounds = 5 if quick else 9 if shape.size > 8 else 31
        results = measure(shape, size, TARGETS[targets], layout, dtype, rounds)
        floor, theirs, ours = (results[name] for name in ("floor", "PEFT", "lorakit"))
        rows.append(
            {
                "precision": str(dtype).removeprefix("torch."),
                "UNet": str(shape),
                "batch": size,
                "targets": targets,
                "layout": layout,
                "PEFT ms": round(1e3 * median(cpu for cpu, _ in theirs.steps()), 1),
                "lorakit ms": round(1e3 * median(cpu for cpu, _ in ours.steps()), 1),
                "step over PEFT": _ratio(ours.steps(), theirs.steps(), 0),
                "elapsed over PEFT": _ratio(ours.steps(), theirs.steps(), 1),
                "passes over PEFT": _ratio(ours.passes, theirs.passes, 0),
                "floor over PEFT": _ratio(floor.passes, theirs.passes, 0),
                "kept MB": round(ours.kept / 1e6, 2),
                "kept over PEFT": round(ours.kept / theirs.kept, 3),
            }
        )
    return rows


def _ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], clock: int) -> float:
    """Return the median ratio of the pairs of steps, by one of the clocks."""
    return round(median(a[clock] / b[clock] for a, b in zip(ours, theirs, strict=True)), 3)
