"""The training loop of every part: AdamW, gradients clipped, and a running average of the weights, which is the result.

A part's batch and noise depend on the step's number alone, and a checkpoint holds everything else. So a run that was
killed and started again ends with the same bits as one that was not (with the same number of threads on the same CPU).
The rate warms up, stays, and falls to zero over the last DECAY of the steps: until then a run does not depend on how
many steps it is to have, and a longer one may continue a shorter one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.io.atomic import replacing

WARM_UP, DECAY = 200, 0.3
REPORT_EVERY = 100  # steps


@dataclass
class Part:
    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]  # of a step
    learning_rate: float
    average: float = 0.999  # share of the average that a step keeps, once it has run for long
    validate: Callable[[nn.Module], dict[str, float]] | None = None  # of the averaged weights; every 1,000 steps


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min((step + 1) / warm_up, 1.0, (steps - step) / (DECAY * steps))


def checkpoint_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def save(state: dict, path: Path) -> None:
    """The new file or, if the process is killed meanwhile, the old one."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_average(model: nn.Module, folder: Path, name: str) -> int:
    """Puts the averaged weights of a checkpoint into the model. Returns the number of steps they had."""
    state = torch.load(checkpoint_file(folder, name), weights_only=True)
    model.load_state_dict(state["average"])
    return state["step"]


def train(part: Part, folder: Path, steps: int, minutes: float | None = None, save_every: int = 100) -> bool:
    """Trains until `steps` or, in this call, for `minutes`. Returns whether all steps are done."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_file(folder, part.name)
    parameters = list(part.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=part.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {name: tensor.detach().clone() for name, tensor in part.model.state_dict().items()}
    step, seconds, running = 0, 0.0, None
    if path.exists():
        state = torch.load(path, weights_only=True)
        part.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        step, seconds, running = state["step"], state["seconds"], state["running"]
        print(f"{part.name}: continuing from step {step:,}", flush=True)

    began, begun_at = time.monotonic(), step
    while step < steps:
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = part.learning_rate * rate(step, steps)
        loss = part.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep_average(average, part.model, min(part.average, step / (step + 10)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % save_every == 0:
            save(state_of(part, optimizer, average, step, seconds + time.monotonic() - began, running), path)
        if step % REPORT_EVERY == 0 or step == steps:
            spent = time.monotonic() - began
            left = (steps - step) * spent / (step - begun_at)
            row = {"part": part.name, "step": step, "steps": steps, "loss": round(running, 4)}
            row |= {"minutes": round((seconds + spent) / 60, 1), "minutes_left": round(left / 60)}
            if part.validate and (step % (10 * REPORT_EVERY) == 0 or step == steps):
                row |= validated(part, average)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            with (folder / "log.jsonl").open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
    save(state_of(part, optimizer, average, step, seconds + time.monotonic() - began, running), path)
    return step >= steps


def state_of(part: Part, optimizer, average: dict, step: int, seconds: float, running: float | None) -> dict:
    return {
        "model": part.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "seconds": seconds,
        "running": running,
    }


@torch.no_grad()
def keep_average(average: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    floating = [(average[name], tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [t for _, t in floating], 1 - keep)


def validated(part: Part, average: dict[str, Tensor]) -> dict[str, float]:
    """The part's own measures with the averaged weights in place; the trained ones are put back."""
    assert part.validate is not None
    trained = {name: tensor.clone() for name, tensor in part.model.state_dict().items()}
    part.model.load_state_dict(average)
    part.model.eval()
    with torch.no_grad():
        measures = part.validate(part.model)
    part.model.train()
    part.model.load_state_dict(trained)
    return {name: round(value, 4) for name, value in measures.items()}
