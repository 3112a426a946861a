"""What a training run holds in memory from its first step to its last, counted on a base without weights.

    weights · autoencoder · adapter · gradients · optimizer

For bases whose step is not run on shapes alone (pipelines of diffusers, vision models): the activations are not among
these; they grow with the picture and the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config import RunSettings
from ..config.optimizers import state_bytes
from ..methods import method_of
from ..tasks import task_of
from .shell import PlanError, plan_errors


@dataclass(frozen=True)
class StaticEstimate:
    """Bytes by part. `trained`, `parameters`: elements of the trained parameters and of the base's."""

    parts: Mapping[str, int]
    trained: int
    parameters: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the total, for JSON."""
        return asdict(self) | {"parts": dict(self.parts), "total": self.total}


def static_estimate(config: RunSettings, dtype: torch.dtype, name: str, overhead: int) -> StaticEstimate:
    """Count a run's weights, adapter, gradients and optimizer state. `name`: the adapter's; `overhead`: the process's.

    Raises PlanError for a base that is not known without loading it.
    """
    task, method = task_of(config.task), method_of(config.method)
    base = task.blueprint(config)
    if base is None:
        raise PlanError(f"{config.model} is a single file, whose parts are known only when it is loaded")
    with plan_errors(config.model):
        model = task.skeleton(config, base, dtype)
        own = sum(p.numel() for p in model.parameters())
        parts = {child: _bytes(module) for child, module in model.named_children()}
        pipe = getattr(model, "pipe", None)
        vae = pipe.components.get("vae") if pipe is not None else None
        if isinstance(vae, nn.Module):
            parts["vae"] = _bytes(vae)
        method.attach(model, config, name, task.peft_type)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    state = state_bytes(config.optimizer, trained)
    parts |= {"adapter": size, "gradients": size, "optimizer": state, "overhead": overhead}
    return StaticEstimate(parts, sum(p.numel() for p in trained), own)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
