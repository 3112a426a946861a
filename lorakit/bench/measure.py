"""Measure time (sides interleaved in one process, medians) and the bytes kept for backward."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Name = TypeVar("Name", bound=Hashable)
PRECISIONS = (torch.float32, torch.bfloat16)  # for the tables that measure in several


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return each side's median seconds over `rounds`, after `warm` warm-up rounds. A round runs every side once.

    Interleaving spreads a slow phase of the machine over all sides. clock: time.process_time for CPU time, which other
    processes disturb less.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warm):
        for name, run in sides.items():
            _synchronize()
            began = clock()
            run()
            _synchronize()
            if turn >= warm:
                times[name].append(clock() - began)
    return {name: median(seconds) for name, seconds in times.items()}


def cpu_and_wall(
    parts: Mapping[Name, Callable[[], object]], rounds: int, warm: int = 2
) -> dict[Name, list[tuple[float, float]]]:
    """Return (processor seconds, elapsed seconds) of each part in every round, for ratios of pairs. See `in_turn`."""
    times: dict[Name, list[tuple[float, float]]] = {name: [] for name in parts}
    for turn in range(rounds + warm):
        for name, run in parts.items():
            _synchronize()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            _synchronize()
            if turn >= warm:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def seconds(call: Callable[..., object], *args: Any) -> float:
    """Time a call without garbage collection, which would be charged to whichever side triggers it."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        call(*args)
        return time.perf_counter() - began
    finally:
        gc.enable()


def training_step(model: nn.Module, forward: Callable[[Any], Tensor]) -> Callable[[], None]:
    """Return a call of a model's forward, with a backward if anything needs gradients, which are dropped."""

    def run_once() -> None:
        y = forward(model)
        if y.requires_grad:
            y.square().mean().backward()
        model.zero_grad()

    return run_once


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps for backward: each storage once, without model parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is reused

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # nodes may save their own output: with its grad_fn that would be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
