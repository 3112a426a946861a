"""What a run asks of several processes, over accelerate: one process, or data parallel (DistributedDataParallel).

Each process has the whole model and a share of each batch. Gradients are averaged over processes with the last
micro-batch of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")


class Parallel:
    """This process among `world`; it is number `rank`, and computes on `device`."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        # the base's precision is the task's matter; factors are float32
        self._accelerator: Any = Accelerator(mixed_precision="no")
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self._accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: the same object, or its DistributedDataParallel."""
        return self._accelerator.prepare_model(model)

    def share(self, batch: Sequence[_T]) -> list[_T]:
        """This process's rows of a batch."""
        return list(batch[self.rank :: self.world])

    def exchanging(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward: gradients are exchanged in the last micro-batch of a step only."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes."""
        return self._accelerator.reduce(values, "mean")

    def agree(self, value: int) -> int:
        """The largest of all processes' values, the same for each."""
        if self.world == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([float(value)], device=self.device)).max())

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()
