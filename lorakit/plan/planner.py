"""From a base's config and a method to estimates, and to the largest batch or length that fits.

    step        weights + adapter + optimizer + best + (gradients, activations, loss, working, at the step's largest
                moment)
    evaluation  weights + adapter + optimizer + best + working
    checkpoint  weights + adapter + optimizer + best + a copy of the optimizer's state

each with the overhead, on a CPU also with the holes in the C library's heap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RunSettings
from ..tasks.task import Task
from .estimate import FOUR_BIT, Estimate
from .largest import largest
from .live import SMALL
from .shell import Shell
from .step import Parts, Traced, evaluation, training_step
from .weightless import MOST_TOKENS

# Blocks below glibc's largest mmap threshold (32 MiB) come to lie in one heap that stays as large as it once was, holes
# between what lives on included. Measured over the most that lies there at once: 1.25 to 1.9 (python -m
# lorakit.bench.plan, which chose this).
HEAP = 1.47
HEAP_CHECKPOINTING = 2.3  # what is kept lies scattered between what a layer makes and drops; 2.4 was measured
# NF4 with double quantization: 4 bits, and for each block of 64 a scale in 8 bits, and for 256 of these one in 32
# (Dettmers et al. 2023, section 3): 4 + 8/64 + 32/(64·256) bits.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
MOST_ROWS = 256  # more are not looked for
COLUMNS = 8  # batches are padded to a multiple of so many


@dataclass(frozen=True)
class Setting:
    """What a run is, besides the base: all that decides its memory."""

    dtype: torch.dtype
    device: torch.device
    task: Task
    overhead: int
    attach: Callable[[Any], object]  # puts on the model what the method trains
    config: RunSettings
    method: str = "lora"
    four_bit: bool = False
    checkpointing: bool = False
    plain_attention: int = 0  # rows up to this length use it
    state_copies: int = 2
    validation: int = 0  # rows of an evaluation's batch; 0: none
    share: float = 1.0  # weight of rows by their size: of text, which part of the positions is trained
    batch: int = 1  # rows of an optimizer step; more than are computed at once are accumulated


class Planner:
    """Estimates for one base and one method. Building the model's shell is the slow part, so it is made once."""

    def __init__(self, base: Any, setting: Setting):
        """`base`: transformers' config."""
        self.setting = setting
        build = partial(setting.task.skeleton, setting.config, base, setting.dtype)
        self.shell = Shell(type(base).__name__, build, setting.attach, checkpointing=setting.checkpointing)
        self._traced: dict[tuple[int, int, bool], Traced] = {}
        self._judged: dict[int, Traced] = {}  # evaluations, by length

    @property
    def positions(self) -> int | None:
        """The longest row that the model takes."""
        return getattr(self.shell.model.config.get_text_config(), "max_position_embeddings", None)

    def four_bit(self) -> Planner:
        """The same with the base's linear weights in 4 bits."""
        other = copy.copy(self)  # with what is traced already
        other.setting = replace(self.setting, four_bit=True)
        return other

    def estimate(self, rows: int, length: int, accumulating: bool | None = None) -> Estimate:
        """With `rows` of `length` computed at once."""
        length = -(-length // COLUMNS) * COLUMNS
        if accumulating is None:
            accumulating = rows < self.setting.batch
        return self._estimate(rows, length, accumulating)

    def most_rows(self, length: int, memory: int) -> int:
        """The most rows of `length` at once that fit (to two percent); 0 if not even one does."""
        if sum(self._resting().values()) > memory:
            return 0
        most = max(1, min(MOST_ROWS, MOST_TOKENS // length))
        return largest(lambda rows: self.estimate(rows, length).total, memory, most, slack=0.02)

    def longest(self, rows: int, memory: int, most: int | None = None) -> int:
        """The longest length (to two percent) of which `rows` at once fit; 0 if none does."""
        if sum(self._resting().values()) > memory:
            return 0
        most = min(most or 1 << 20, self.positions or 1 << 20, MOST_TOKENS // max(rows, self.setting.validation))
        return COLUMNS * largest(
            lambda n: self.estimate(rows, n * COLUMNS).total, memory, max(1, most // COLUMNS), slack=0.02
        )

    def _resting(self) -> dict[str, int]:
        """Bytes by part that are there all the time."""
        setting, shell = self.setting, self.shell
        size, weights = shell.trained_bytes(), shell.weight_bytes
        if setting.four_bit:
            weights += sum(int(w.numel() * NF4_BYTES) - w.numel() * w.element_size() for w in shell.linear_weights())
        return {
            "weights": weights,
            "adapter": shell.added_bytes,
            "optimizer": setting.state_copies * size,
            "overhead": setting.overhead,
            "best": size if setting.device.type == "cpu" and setting.validation else 0,
        }

    def _estimate(self, rows: int, length: int, accumulating: bool) -> Estimate:
        setting, shell = self.setting, self.shell
        shell.attention(plain=length <= setting.plain_attention)
        size, working = shell.trained_bytes(), 0
        if setting.four_bit:  # one weight at a time, made whole
            working = max((w.numel() * w.element_size() for w in shell.linear_weights()), default=0)
        on_cpu = setting.device.type == "cpu"
        resting = self._resting()
        key = (rows, length, accumulating)
        if key not in self._traced:
            self._traced[key] = training_step(shell, self._batch(rows, length), self._loss, accumulating)
        step = self._traced[key]
        held_out = self._evaluation(length)
        stretches = [*step.stretches.values(), *held_out.values()]
        heap = (
            int(
                (HEAP_CHECKPOINTING if setting.checkpointing else HEAP)
                * max(parts.get(SMALL, 0) for parts in stretches)
            )
            if on_cpu
            else 0
        )
        moments = {"step": _moment(resting, step.stretches, working, heap)}
        if held_out:
            moments["evaluation"] = _moment(resting, held_out, working, heap)
        if on_cpu:
            copies = setting.state_copies * size
            moments["checkpoint"] = resting | {"working": copies, "holes": max(0, heap - copies)}
        method = f"{FOUR_BIT}{setting.method}" if setting.four_bit else setting.method
        count = sum(p.numel() for p in shell.trained())
        return Estimate(method, rows, length, shell.base_parameters(), count, size, moments, step.flops)

    def _evaluation(self, length: int) -> dict[str, Parts]:
        """The stretches of an evaluation; none if nothing is held out."""
        rows = self.setting.validation
        if rows and length not in self._judged:
            self._judged[length] = evaluation(self.shell, self._batch(rows, length), self.setting.task.losses)
        return self._judged[length].stretches if rows else {}

    def _batch(self, rows: int, length: int) -> dict[str, Tensor]:
        return self.setting.task.example(rows, length, self.setting.share)

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.setting.task.losses(model, batch).sum()


def _moment(resting: Parts, stretches: dict[str, Parts], working: int, heap: int) -> Parts:
    """The largest of a job's stretches, with what is there all the time. `heap`: what the C library's heap has grown
    to.
    """

    def whole(parts: Parts) -> Parts:
        own = {part: size for part, size in parts.items() if part != SMALL}
        own["working"] = own.get("working", 0) + working
        own["holes"] = max(0, heap - parts.get(SMALL, 0))
        return resting | own

    return max((whole(parts) for parts in stretches.values()), key=lambda parts: sum(parts.values()))
