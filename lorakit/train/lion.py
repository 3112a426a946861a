"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2). torch has none.

θ ← (1 - lr · decay) θ - lr · sign(β1 m + (1 - β1) g)
m ← β2 m + (1 - β2) g
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """One average `m` for each parameter. Every element moves by `lr` in each step."""

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step. `closure`: computes the loss and its gradients again, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"]
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(average.lerp(gradient, 1 - beta1).sign_(), alpha=-group["lr"])
                average.lerp_(gradient, 1 - beta2)
        return loss
