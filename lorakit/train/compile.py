"""Training steps through torch.compile (inductor): the layers of each stack are compiled, one graph for all of them.

So compiling takes as long as one layer takes, whatever the model's depth, and the loss keeps its own form. The graph is
made before the first step, from a batch of the run's largest size, with sizes left open: rows of other lengths need no
other graph, and a resumed run computes with the same code as one that was never stopped. Evaluation and samples run the
model as it is (`as_it_is`).
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TrainError
from ..layers.layer import LoraLayer
from ..tasks.task import Task
from .config import TrainConfig

LENGTH_MULTIPLE = 8  # of a batch's columns, see `data.batches.collate`


def check(config: TrainConfig, device: torch.device, processes: int, runs: int = 1) -> None:
    """Refuse what compiled steps are not known to be right for, and machines that cannot compile."""
    if runs > 1:
        raise ConfigError("compile: runs that train together need another graph for each mix of them; leave it out")
    if processes > 1:
        raise ConfigError(
            f"compile: with {processes} processes it has not been shown to be right; leave one of the two out"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"compile: on {device.type} it has not been shown to be right; leave it out")
    if device.type == "cpu" and (why := no_compiler()) is not None:
        raise TrainError(f"compile: {why}\n  install one (Debian: apt-get install g++), or leave compile out")


def no_compiler() -> str | None:
    """Why there is no C++ compiler for inductor, or None if there is one."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler was found (g++ or clang++), which torch.compile needs on a CPU"
    return None


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of every stack: items of one class in a ModuleList, with adapted modules in them (or with parameters
    that train).
    """
    found: list[nn.Module] = []
    for stack in model.modules():
        if (
            isinstance(stack, nn.ModuleList)
            and len(stack) > 1
            and len({type(layer) for layer in stack}) == 1
            and not _inside(stack, found)
        ):
            found += [
                layer for layer in stack if any(isinstance(m, LoraLayer) for m in layer.modules()) or _trains(layer)
            ]
    return found


def compile_layers(model: nn.Module, rows: set[int], length: int, task: Task) -> str:
    """Compile them in place, on batches of these numbers of rows. What was done, for the start panel."""
    layers = repeated_layers(model)
    if not layers:
        raise TrainError(
            f"compile: {type(model).__name__} has no stack of like layers (a ModuleList) that trains; leave compile out"
        )
    began = time.perf_counter()
    device = next(model.parameters()).device
    length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.no_grad():  # what the loss finds out about a model, it finds out without layers that are compiled
            task.losses(model, _batch(task, 1, LENGTH_MULTIPLE, device))
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            for n in sorted(rows, reverse=True):
                task.losses(model, _batch(task, n, length, device)).sum().backward()
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TrainError(
                f"compile: inductor could not compile {type(model).__name__}: {first}\n  leave compile out"
            ) from error
    for parameter in model.parameters():
        parameter.grad = None
    return f"{len(layers)} layers with inductor, {graphs()} graphs, in {time.perf_counter() - began:.0f} s"


def rows_at_once(most: int, batch: int, rows: int) -> set[int]:
    """Numbers of rows that need graphs of their own: any number from two on shares one, a single row has its own."""
    last = rows % batch or batch  # of an epoch's last step
    return {most} | ({1} if 1 in (most, batch % most, last % most) else set())


def graphs() -> int:
    """How many graphs this process has compiled; further ones are recompilations."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def as_it_is() -> contextlib.AbstractContextManager[Any]:
    """Within it compiled layers run their plain forward: what is not a training step would need graphs of its own."""
    return torch.compiler.set_stance("force_eager")


def _batch(task: Task, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in task.example(rows, length).items()}


def _inside(stack: nn.Module, layers: list[nn.Module]) -> bool:
    return any(stack is m for layer in layers for m in layer.modules())


def _trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())
