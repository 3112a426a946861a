"""Run on one process, or data parallel on several (DistributedDataParallel), through accelerate.

Each process has a full copy of the model and computes a share of each batch. Gradients are averaged over processes in
the last micro-batch of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..bases.device import choose_device
from .launch import asked_for, check_launch

_T = TypeVar("_T")


class Parallel:
    """One of `world` processes: its `rank` and `device`."""

    def __init__(self, some_unused: bool = False) -> None:
        """Join the other processes, if there are some. Raises TrainError if they would not train together.

        `some_unused`: whether a step may leave trained parameters without a gradient. Else that is an error.
        """
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Without an accelerator, accelerate joins processes only when it is told to use the CPU; torchrun does not.
        on_cpu = asked_for() > 1 and choose_device().value.type == "cpu"
        # The base is loaded in its precision and factors are float32, so accelerate must not autocast.
        self._accelerator: Any = Accelerator(
            mixed_precision="no",
            cpu=on_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
        )
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        check_launch(self.world)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self._accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training: the same object, or its DistributedDataParallel wrapper."""
        return self._accelerator.prepare_model(model)

    def share(self, batch: Sequence[_T]) -> list[_T]:
        """Return this process's rows of a batch."""
        return list(batch[self.rank :: self.world])

    def exchanging(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context for a forward and backward. Gradients are all-reduced in the last micro-batch only."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a scalar loss."""
        self._accelerator.backward(loss)

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes."""
        return self._accelerator.reduce(values, "mean")

    def agree(self, value: int) -> int:
        """Return the largest of all processes' values, to every process."""
        if self.world == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([float(value)], device=self.device)).max())

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._accelerator.wait_for_everyone()
