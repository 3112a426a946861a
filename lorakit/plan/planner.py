"""Estimate a run from its base's config and method, and find the largest batch or length that fits.

    step        weights + adapter + optimizer + best + (gradients, activations, loss, working) at the step's peak
    evaluation  weights + adapter + optimizer + best + working
    checkpoint  weights + adapter + optimizer + best + a copy of the optimizer's state

Each includes the overhead and, on a CPU, the holes in the C library's heap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.positions import usable_positions
from ..config import RunSettings
from ..config.optimizers import state_bytes
from ..methods import method_of
from ..tasks.task import Task
from .estimate import Estimate
from .largest import largest
from .live import SMALL
from .machine import LIBRARIES
from .packed import Packing
from .shell import Shell
from .step import Parts, Traced, evaluation, training_step
from .weightless import MOST_TOKENS

# Blocks below glibc's largest mmap threshold (32 MiB) are allocated on one heap, which fragments and never shrinks. Its
# size relative to the most bytes in use there at once: 1.25 to 1.9 measured (python -m lorakit.bench.plan chose this).
HEAP = 1.47
# On a quantized base each linear's temporary dense weight lies between tensors that are kept: 1.7 to 2.2 measured.
HEAP_PACKED = 1.85
HEAP_CHECKPOINTING = 2.3  # kept tensors are scattered between a layer's temporary ones; 2.4 was measured
MOST_ROWS = 256  # where the search for the largest batch ends
LONGEST = 1 << 20  # tokens, where the search for the longest row ends
COLUMNS = 8  # batches are padded to a multiple of this


@dataclass(frozen=True)
class PlanSettings:
    """All that affects a run's memory, besides the base."""

    dtype: torch.dtype
    device: torch.device
    task: Task
    overhead: int  # bytes, see `machine.overhead`
    attach: Callable[[Any], object]  # adds the method's trained parameters to the model
    config: RunSettings
    method: str = "lora"
    packing: Packing | None = None  # how the base's linears are stored; None: not quantized
    checkpointing: bool = False
    offload: bool = False  # what checkpointing keeps lies outside the device's memory
    plain_attention: int = 0  # rows up to this many tokens use plain attention
    validation: int = 0  # held-out rows, of which as many are evaluated at once as are trained; 0: no evaluation
    share: float = 1.0  # trained tokens / tokens
    batch: int = 1  # rows of an optimizer step


class Planner:
    """Makes estimates for one base and one method. The model's shell, which is slow to build, is built once."""

    def __init__(self, base: Any, settings: PlanSettings):
        """`base`: the base's transformers config. Raises PlanError if the model cannot be built from it."""
        self.settings, self.base = settings, base
        build = partial(settings.task.skeleton, settings.config, base, settings.dtype)
        self.shell = Shell(
            type(base).__name__,
            build,
            settings.attach,
            checkpointing=settings.checkpointing,
            offload=settings.offload,
            packing=settings.packing,
        )
        self.optimizer_bytes = state_bytes(settings.config.optimizer, self.shell.trained())
        self._traced: dict[tuple[int, int, bool], Traced] = {}
        self._evaluations: dict[tuple[int, int], Traced] = {}  # by rows and length
        # A loss may inspect a model once and remember the result. Let it do so now: then all estimates count the same.
        evaluation(self.shell, self._batch(1, COLUMNS), settings.task.losses)

    @property
    def title(self) -> str:
        """Its method's title, and how the base is stored."""
        own, packing = method_of(self.settings.method).title, self.settings.packing
        return own if packing is None else f"{own}, {packing.name}"

    @property
    def positions(self) -> int | None:
        """The model's number of positions, None if unlimited."""
        return usable_positions(self.shell.model.config)

    @property
    def name(self) -> str:
        """The name of its estimates: the method's, after how the base's linears are stored."""
        packing = self.settings.packing
        return self.settings.method if packing is None else f"{packing.name} {self.settings.method}"

    def stored(self, packing: Packing) -> Planner:
        """Return a planner of the same run on a base whose linears are stored in another way. Raises PlanError."""
        return Planner(self.base, replace(self.settings, packing=packing))

    def checkpointed(self, checkpointing: bool, offload: bool) -> Planner:
        """Return a planner of the same run with or without gradient checkpointing and offload of what it keeps."""
        return Planner(self.base, replace(self.settings, checkpointing=checkpointing, offload=offload))

    def estimate(self, rows: int, length: int, accumulating: bool | None = None) -> Estimate:
        """Estimate a run that computes `rows` rows of `length` tokens at once.

        `accumulating`: whether gradients are accumulated over micro-batches; None: if the batch has more rows. Raises
        PlanError if the model cannot run on shapes.
        """
        length = -(-length // COLUMNS) * COLUMNS
        if accumulating is None:
            accumulating = rows < self.settings.batch
        return self._estimate(rows, length, accumulating)

    def most_rows(self, length: int, memory: int) -> int:
        """Return how many rows of `length` tokens fit into `memory` bytes at once, within two percent; 0 if none."""
        if sum(self._resting().values()) > memory:
            return 0
        most = max(1, min(MOST_ROWS, MOST_TOKENS // length))
        return largest(lambda rows: self.estimate(rows, length).total, memory, most, slack=0.02)

    def longest(self, rows: int, memory: int, most: int | None = None, beyond: bool = False) -> int:
        """Return the largest length (tokens) at which `rows` rows fit into `memory` bytes at once, within two percent;
        0 if none.

        `most`: search up to this length; None: to the model's positions, or `beyond` them, to `LONGEST`.
        """
        if sum(self._resting().values()) > memory:
            return 0
        bound = LONGEST if beyond else min(LONGEST, self.positions or LONGEST)
        most = min(most or LONGEST, bound, MOST_TOKENS // rows)
        return COLUMNS * largest(
            lambda n: self.estimate(rows, n * COLUMNS).total, memory, max(1, most // COLUMNS), slack=0.02
        )

    def _resting(self) -> dict[str, int]:
        """Return the bytes that are allocated throughout the run, by part."""
        settings, shell = self.settings, self.shell
        size, weights = shell.trained_bytes, shell.weight_bytes
        return {
            "weights": weights,
            "adapter": shell.added_bytes,
            "optimizer": self.optimizer_bytes,
            "overhead": settings.overhead + self._library(),
            "best": size if settings.device.type == "cpu" and settings.validation else 0,
        }

    def _heap(self) -> float:
        """Return the size of the C library's heap relative to the most bytes in use there."""
        packing = self.settings.packing
        if self.settings.checkpointing:
            return HEAP_CHECKPOINTING
        return HEAP if packing is None or packing.storage.saves == "weight" else HEAP_PACKED

    def _library(self) -> int:
        """Return the bytes of the library that the base's linears need; on a GPU it is not in the device's memory."""
        packing = self.settings.packing
        if packing is None or self.settings.device.type != "cpu":
            return 0
        return LIBRARIES.get(packing.storage.method, 0)

    def _estimate(self, rows: int, length: int, accumulating: bool) -> Estimate:
        settings, shell = self.settings, self.shell
        shell.attention(plain=length <= settings.plain_attention)
        size = shell.trained_bytes
        on_cpu = settings.device.type == "cpu"
        resting = self._resting()
        key = (rows, length, accumulating)
        if key not in self._traced:
            batch = self._batch(rows, length, packed=settings.task.packs(settings.config))
            self._traced[key] = training_step(shell, batch, self._loss, accumulating)
        step = self._traced[key]
        held_out = self._evaluation(min(rows, settings.validation), length)
        stretches = [*step.stretches.values(), *held_out.values()]
        heap = int(self._heap() * max(parts.get(SMALL, 0) for parts in stretches)) if on_cpu else 0
        moments = {"step": _moment(resting, step.stretches, heap)}
        if held_out:
            moments["evaluation"] = _moment(resting, held_out, heap)
        if on_cpu:
            copies = self.optimizer_bytes
            moments["checkpoint"] = resting | {"working": copies, "holes": max(0, heap - copies)}
        base, trained = shell.base_parameters(), shell.trained_parameters
        storage = None if settings.packing is None else settings.packing.name
        return Estimate(self.name, storage, rows, length, base, trained, size, moments, step.flops)

    def _evaluation(self, rows: int, length: int) -> dict[str, Parts]:
        """Trace an evaluation, which computes as many rows at once as training. Returns its peaks by stretch; empty
        without held-out rows.
        """
        key = (rows, length)
        if rows and key not in self._evaluations:
            self._evaluations[key] = evaluation(self.shell, self._batch(rows, length), self.settings.task.losses)
        return self._evaluations[key].stretches if rows else {}

    def _batch(self, rows: int, length: int, packed: bool = False) -> dict[str, Tensor]:
        return self.settings.task.example(rows, length, self.settings.share, packed)

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.settings.task.losses(model, batch).sum()


def _moment(resting: Parts, stretches: dict[str, Parts], heap: int) -> Parts:
    """Return the bytes by part of the largest stretch, including what is always allocated.

    `heap`: the size to which the C library's heap has grown.
    """

    def all_parts(parts: Parts) -> Parts:
        own = {part: size for part, size in parts.items() if part != SMALL}
        own["holes"] = max(0, heap - parts.get(SMALL, 0))
        return resting | own

    return max((all_parts(parts) for parts in stretches.values()), key=lambda parts: sum(parts.values()))
