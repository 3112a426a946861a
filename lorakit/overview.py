"""What is attached to a model, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .attached import layer_at, names_of, state_of
from .layers.layer import LoraFactors, child_name


@dataclass(frozen=True)
class Summary:
    """What is attached. Print it."""

    trainable: int
    total: int
    rows: list[tuple[str, str, str, int, int]]  # adapter, module, shape, rank, parameters
    active: dict[str, float]
    skipped: dict[str, str]

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0
        lines = [
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.3g} %); active: {names_of(self.active) if self.active else 'the base alone'}"
        ]
        groups: dict[tuple[str, str, str, int], list[int]] = {}
        for adapter, module, shape, rank, count in self.rows:
            groups.setdefault((adapter, module.rsplit(".", 1)[-1], shape, rank), []).append(count)
        width = max((len(k[1]) for k in groups), default=0)
        for (adapter, last, shape, rank), counts in groups.items():
            lines.append(f"  {adapter}: {last:<{width}}  {len(counts):>4} x {shape:<14} rank {rank:<4} {sum(counts):>12,}")
        lines += [f"  left out: {module} ({why})" for module, why in self.skipped.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Trainable and total parameters, and each adapter's share per target."""
    state = state_of(model)
    rows, skipped = [], {}
    for name, attached in state.adapters.items():
        skipped.update(attached.skipped)
        for m in attached.modules:
            layer = layer_at(model, m)
            child: LoraFactors = layer._modules[child_name(name)]  # type: ignore[attr-defined]
            shape = "x".join(str(s) for s in getattr(layer, "weight", torch.empty(0)).shape)
            rows.append((name, m, shape, child.rank, child.A.numel() + child.B.numel()))
    every = {id(p): p for p in model.parameters()}.values()
    return Summary(sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every), rows, dict(state.active), skipped)
