"""Validation: the loss of pictures on fixed noise and timesteps, so that two evaluations differ by the model alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...data.pictures.item import PictureItem
from ...errors import NotFiniteError
from ...generate.eval_mode import evaluating
from ..task import Base
from .encoded import PictureRow, Pictures, on_device
from .loss import QUARTILES, fixed_losses


def validate(base: Base, items: Sequence[PictureRow], batch_size: int) -> dict[str, float]:
    """Return the mean loss, and that of each quartile of the timesteps, from little noise to much.

    A picture's noise depends on its file alone. Raises NotFiniteError, naming the picture, if a loss is not finite.
    """
    pictures: Pictures = base.processor
    device = next(base.model.parameters()).device
    plain = [row.plain for row in items]
    sums = torch.zeros(QUARTILES, dtype=torch.float64)
    with evaluating(base.model), torch.no_grad():
        for rows in _batches(plain, batch_size):
            batch = pictures.collate(rows)
            prompts = on_device(batch["prompts"], device)
            seeds = [_seed(row.item) for row in rows]
            found = fixed_losses(base.model, batch["latents"].to(device), prompts, pictures.diffusion, seeds)
            for row, values in zip(rows, found.double().cpu(), strict=True):
                if not math.isfinite(float(values.sum())):
                    raise NotFiniteError(
                        f"{row.where}: its loss is not finite (NaN or infinity)\n"
                        "  load the pipeline in bf16 or fp32 rather than fp16 (precision)"
                    )
                sums += values
    quartiles = (sums / len(plain)).tolist()
    return {"loss": sum(quartiles) / QUARTILES} | {f"loss_q{n}": value for n, value in enumerate(quartiles, start=1)}


def _seed(item: PictureItem) -> int:
    return int(item.content[:15], 16)


def _batches(rows: Sequence[PictureRow], size: int) -> list[list[PictureRow]]:
    """Group rows of one bucket."""
    groups: dict[Any, list[PictureRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
