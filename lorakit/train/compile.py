"""Compile the training step with torch.compile (inductor): the repeated layers of a model, which share one graph.

Compile time is that of one layer, whatever the model's depth, and the loss stays as it is. The graph is compiled before
the first step, on a batch of the run's largest size and with dynamic shapes: rows of other lengths need no new graph,
and a resumed run uses the same code as an uninterrupted one. Evaluation and samples run uncompiled (`uncompiled`).
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

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this, see `data.batches.collate`


def check(config: TrainConfig, device: torch.device, processes: int, runs: int = 1) -> None:
    """Raise ConfigError where compiled steps are untested, and TrainError if this machine has no compiler."""
    if runs > 1:
        raise ConfigError("compile: a sweep needs a new graph for each mix of runs\n  remove compile")
    if processes > 1:
        raise ConfigError(f"compile: not tested with {processes} processes\n  use one process, or remove compile")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"compile: not tested on {device.type}\n  remove compile")
    if device.type == "cpu" and (why := no_compiler()) is not None:
        raise TrainError(f"compile: {why}\n  install one (Debian: apt-get install g++), or remove compile")


def no_compiler() -> str | None:
    """Say what is missing if inductor finds no C++ compiler; None if it finds one."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler was found (g++ or clang++), which torch.compile needs on a CPU"
    return None


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Find the repeated layers: modules of one class in a ModuleList, with adapted modules or trainable parameters."""
    layers: list[nn.Module] = []
    for stack in model.modules():
        if (
            isinstance(stack, nn.ModuleList)
            and len(stack) > 1
            and len({type(layer) for layer in stack}) == 1
            and not _inside(stack, layers)
        ):
            layers += [
                layer for layer in stack if any(isinstance(m, LoraLayer) for m in layer.modules()) or _trains(layer)
            ]
    return layers


def compile_layers(model: nn.Module, rows: set[int], length: int, task: Task) -> str:
    """Compile the repeated layers in place. Returns a description for the start panel.

    `rows`: the numbers of rows to compile for; `length`: tokens of the longest row. Raises TrainError if the model has
    no repeated layers, or inductor fails.
    """
    layers = repeated_layers(model)
    if not layers:
        raise TrainError(
            f"compile: {type(model).__name__} has no repeated layers (a ModuleList of one class) that are trained\n"
            "  remove compile"
        )
    began = time.perf_counter()
    device = next(model.parameters()).device
    length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.no_grad():  # the loss probes the model once: let it do so before the layers are compiled
            task.losses(model, _batch(task, 1, LENGTH_MULTIPLE, device))
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            for n in sorted(rows, reverse=True):
                task.losses(model, _batch(task, n, length, device)).sum().backward()
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TrainError(
                f"compile: inductor could not compile {type(model).__name__}: {first}\n  remove compile"
            ) from error
    for parameter in model.parameters():
        parameter.grad = None
    return f"{len(layers)} layers with inductor, {graphs()} graphs, in {time.perf_counter() - began:.0f} s"


def row_counts(most: int, batch: int, rows: int) -> set[int]:
    """Return the row counts to compile for: inductor specializes a single row, and any more share one graph.

    `most`: rows of a micro-batch; `batch`: rows of a step; `rows`: rows of the training data.
    """
    last = rows % batch or batch  # rows of an epoch's last step
    return {most} | ({1} if 1 in (most, batch % most, last % most) else set())


def graphs() -> int:
    """Return the number of graphs compiled in this process; each later increase is a recompilation."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled layers run eagerly: evaluation and samples would need graphs of their own."""
    return torch.compiler.set_stance("force_eager")


def _batch(task: Task, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    batch: dict[str, Any] = task.example(rows, length)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _inside(stack: nn.Module, layers: list[nn.Module]) -> bool:
    return any(stack is m for layer in layers for m in layer.modules())


def _trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())
