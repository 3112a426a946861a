"""Evaluate a model on preferences: its loss, rewards, and how often it has the better answer ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...data.preference_items import PreferenceItem
from ...errors import NotFiniteError
from ...generate.eval_mode import evaluating
from .loss import Scores
from .objective import Objective
from .scores import scores_of


def measures(
    model: Any,
    objective: Objective,
    items: Sequence[PreferenceItem],
    batch_size: int,
    collate: Callable[[Sequence[PreferenceItem]], dict[str, Any]],
) -> dict[str, float]:
    """Return the means over all items: the loss first, then what `Objective.figures` gives.

    For pairs also `likelihood_accuracy`: how often the chosen answer has the higher log-probability per token, which
    needs no reference. Raises NotFiniteError, naming a row, if its loss is not finite.
    """
    ordered = sorted(items, key=lambda item: -item.size)  # similar lengths together need little padding
    sums: dict[str, list[float]] = {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in collate(rows).items()
            }
            scores = scores_of(model, batch)
            losses = objective.losses(scores)
            for item, loss in zip(rows, losses.tolist(), strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(
                        f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
                    )
            for name, values in {"loss": losses, **objective.figures(scores), **_likelihood(scores)}.items():
                sums.setdefault(name, []).extend(value for value in values.tolist() if not math.isnan(value))
    means = {name: sum(values) / len(values) for name, values in sums.items() if values}
    if "reward_margin" not in means and {"reward_chosen", "reward_rejected"} <= means.keys():
        means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
    return means


def _likelihood(scores: Scores) -> dict[str, torch.Tensor]:
    means = scores.means  # [n, k]
    return {"likelihood_accuracy": (means[:, 0] > means[:, 1]).float()} if means.shape[1] == 2 else {}
