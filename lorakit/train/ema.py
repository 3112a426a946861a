"""An exponential moving average of the trained parameters (EMA), which evaluation, samples and the result use.

    average ← d · average + (1 - d) · parameter        d = min(decay, (1 + step) / (10 + step))

The decay is lower in the first steps, so that the average forgets the initialization (as in diffusers' EMAModel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The averages of some parameters, by their names. `values` may be replaced when a run resumes."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]):
        self.decay, self._parameters = decay, parameters
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over the averages of a checkpoint."""
        self.values = {name: values[name].to(p.device, copy=True) for name, p in self._parameters.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model have the averages as its parameters inside the block, bit for bit the old ones after it."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
