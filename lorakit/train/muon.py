"""Muon for matrices, and AdamW for the parameters that it is not for: vectors, kernels, and those of embeddings.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix. Its updates have a size of
0.2 of the learning rate, whatever the shape (Liu et al. 2025); AdamW has a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..config.optimizers import is_matrix


def muon_matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters that Muon trains. An embedding's rows are vectors, one for each token."""
    of_embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    return {name for name, p in parameters.items() if is_matrix(tuple(p.shape)) and id(p) not in of_embeddings}


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer: its groups are those of the two, and so is its state."""

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        """`matrices`, `others`: parameter groups, with learning rates of their own."""
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step. `closure`: computes the loss and its gradients again, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def split(
    groups: Iterable[dict[str, Any]], matrices: set[nn.Parameter]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divide parameter groups into those of matrices and those of other parameters."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        for into, wanted in zip(found, (True, False), strict=True):
            if own := [p for p in group["params"] if (p in matrices) == wanted]:
                into.append(group | {"params": own})
    return found
