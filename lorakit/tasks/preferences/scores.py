"""The log-probabilities of answers: in a batch of training, and of many rows without gradients.

A batch has the answers of its n items as rows of tokens, one item's after the other, in one forward pass. Only their
tokens are projected to the vocabulary, as in supervised training (`text/causal_loss.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...data.batches import collate, pad_id
from ...data.dataset import Item
from ...errors import NotFiniteError
from ...generate.eval_mode import evaluating
from ..text.causal_loss import row_losses
from .loss import Scores

TOKENS_AT_ONCE = 4096  # with padding; as many as a CPU computes at full speed


def scores_of(model: Any, batch: dict[str, Any]) -> Scores:
    """Return the scores of a batch of the task, with gradients."""
    policy = -row_losses(model, batch).view_as(batch["reference"])  # [n, k]
    return Scores(policy, batch["reference"], batch["tokens"], batch.get("desirable"), batch.get("kl"))


def log_probabilities(model: Any, processor: Any, rows: Sequence[Item]) -> list[float]:
    """Return log π of each row's trained tokens, with the model as it is, in eval mode and without gradients.

    Raises NotFiniteError, naming the row, where it is not finite.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].size)  # little padding, the same batches each time
    found = [0.0] * len(rows)
    with evaluating(model), torch.inference_mode():
        while order:
            count = max(1, TOKENS_AT_ONCE // rows[order[-1]].size)
            own = order[-count:]
            del order[-count:]
            batch = collate([rows[index] for index in own], pad_id(processor))
            losses = row_losses(model, {name: each.to(model.device) for name, each in batch.items()})
            for index, loss in zip(own, losses.tolist(), strict=True):
                found[index] = -loss
                if loss != loss or abs(loss) == float("inf"):
                    raise NotFiniteError(
                        f"{rows[index].where}: the log-probability of its answer is {-loss}\n"
                        "  load the model in bfloat16 or float32 rather than float16"
                    )
    return found
