"""Time one joint training step of eight adapters, one row each, against eight lorakit steps with one adapter each.

Both do the same work per adapter, as `lorakit sweep` and `lorakit train` do: forward, loss over all positions,
backward, clipping, AdamW. The joint step runs the base once over all eight rows (`lorakit.route`). The speed-up is
limited by how much faster the machine multiplies eight rows' tokens at once than one row's; that ratio, for the frozen
weights' matrix products alone, is measured too, and so are eight steps of PEFT with the Hugging Face loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk

from ..tasks.text.causal_loss import row_losses
from .measure import PRECISIONS, in_turn
from .train_step import RANK, Shape, llama, peft_side

TITLE = (
    "Eight adapters of rank 16 on all seven linears, one row of 'tokens each' for each: tokens per second of one joint "
    "step over\n"
    "those of eight separate steps (lorakit's, and PEFT's), and the same ratio for the frozen weights' matrix products "
    "alone."
)
ADAPTERS = 8
LAYERS = 4


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[dict[str, Any]]:
    """Return a row for each precision, width and length."""
    widths, lengths = ((256,), (64,)) if quick else ((256, 512, 1024), (64, 128, 512))
    return [
        measure(Shape(width, layers=LAYERS, ffn=width * 11 // 4, length=length), dtype, rounds=3)
        for dtype in precisions
        for width in widths
        for length in lengths
    ]


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure one row of the table: the median of `rounds`."""
    names = [f"adapter{i}" for i in range(ADAPTERS)]
    joint = llama(shape, dtype)
    for name in names:
        lk.attach(joint, lk.LoraConfig(rank=RANK), name=name, trainable=True)
    rows = torch.randint(2, shape.vocabulary, (ADAPTERS, shape.length), device=next(joint.parameters()).device)
    together = joint_step(joint, names, rows)
    ours = separate_steps(lk.attach(llama(shape, dtype), lk.LoraConfig(rank=RANK)), rows)
    peft = separate_steps(peft_side(shape, dtype, 0.0), rows, hugging_face_loss)
    seconds = in_turn(
        {
            "joint": together,
            "separate": ours,
            "PEFT": peft,
            "products": products(joint, rows.numel()),
            "eight products": products(joint, shape.length),
        },
        rounds,
    )
    return {
        "precision": str(dtype).removeprefix("torch."),
        "width": shape.hidden,
        "tokens each": shape.length,
        "joint ms": round(1e3 * seconds["joint"], 1),
        "eight steps ms": round(1e3 * seconds["separate"], 1),
        "throughput": round(seconds["separate"] / seconds["joint"], 2),
        "products alone": round(ADAPTERS * seconds["eight products"] / seconds["products"], 2),
        "over eight of PEFT": round(seconds["PEFT"] / seconds["joint"], 2),
    }


def joint_step(model: nn.Module, names: list[str], rows: Tensor) -> Callable[[], None]:
    """Return the joint step. Rows are equally long, so the adapters' mean losses sum to len(names) times the mean."""
    adapters = [_trained(p for n, p in model.named_parameters() if f".lora_{name}." in n) for name in names]

    def step() -> None:
        with lk.route(model, names):
            (len(names) * mean_loss(model, rows)).backward()
        for parameters, optimizer in adapters:
            _update(parameters, optimizer)

    return step


def mean_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return lorakit's loss, averaged over all positions of the rows."""
    return row_losses(model, {"input_ids": rows, "labels": rows}).sum() / (rows.shape[0] * (rows.shape[1] - 1))


def hugging_face_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the model's own loss."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def separate_steps(
    model: nn.Module, rows: Tensor, loss: Callable[[nn.Module, Tensor], Tensor] = mean_loss
) -> Callable[[], None]:
    """Return a step for each row, one after the other."""
    parameters, optimizer = _trained(p for p in model.parameters() if p.requires_grad)

    def steps() -> None:
        for row in rows.split(1):
            loss(model, row).backward()
            _update(parameters, optimizer)

    return steps


def products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """Return a step's matrix products with the frozen weights, forward and backward, for `tokens` tokens at once."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = {size: weights[0].new_ones(tokens, size) for W in weights for size in W.shape}

    def run() -> None:
        with torch.no_grad():
            for W in weights:
                F.linear(inputs[W.shape[1]], W)
                inputs[W.shape[0]] @ W

    return run


def _trained(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    trained = list(parameters)
    return trained, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def _update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
