"""Loss and perplexity on held-out rows, over the trained positions only.

    loss = − Σ log p(token | tokens before it) / tokens        perplexity = exp(loss)

summed over all trained tokens of all rows, so that a long row counts for more than a short one and batches do not
matter. The first token of a row is predicted from nothing and is left out. The losses are those of training
(`causal_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...data.batches import collate
from ...errors import ConfigError, DataError, NotFiniteError
from ...generate.eval_mode import evaluating
from ...generate.generate import positions_of
from .causal_loss import row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...data.dataset import Item


@dataclass(frozen=True)
class Loss:
    """`loss` in nats a token; `tokens` were trained ones."""

    loss: float
    perplexity: float
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: a perplexity beyond floating point is None."""
        finite = self.perplexity if math.isfinite(self.perplexity) else None
        return {"loss": self.loss, "perplexity": finite, "tokens": self.tokens, "rows": self.rows}


def perplexity(
    model: PreTrainedModel,
    items: Sequence[Item],
    pad_id: int,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Loss:
    """The loss of `items`. `on_batch` hears after each batch how many rows it held."""
    _check(model, items, batch_size)
    ordered = sorted(items, key=lambda item: -len(item.ids))  # like lengths together: little padding
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_id).items()}
            for item, row_loss in zip(rows, row_losses(model, batch).tolist(), strict=True):
                if not math.isfinite(row_loss):
                    raise NotFiniteError(
                        f"{item.row.where}: the loss is {row_loss}\n"
                        "  the model's logits overflow or hold NaN on this row: load the model in bfloat16 or float32 "
                        "rather than float16,\n"
                        "  and look at the adapter (lorakit inspect) for factors that are not finite"
                    )
                total += row_loss
                tokens += item.weight
            if on_batch is not None:
                on_batch(len(rows))
    loss = total / tokens
    return Loss(loss, math.exp(loss) if loss < 709 else math.inf, tokens, len(ordered))  # exp(710) is beyond float64


def _check(model: PreTrainedModel, items: Sequence[Item], batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}\n  expected at least 1")
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder model\n"
            "  the loss here is that of a decoder reading prompt and answer as one text"
        )
    if not items:
        raise DataError("no rows to evaluate\n  expected at least one")
    positions = positions_of(model)
    for item in items:
        if positions is not None and len(item.ids) > positions:
            raise DataError(
                f"{item.row.where}: {len(item.ids)} tokens, but the model has {positions} positions\n"
                "  shorten the row or set max_length"
            )
        if not any(item.trained[1:]):
            raise DataError(
                f"{item.row.where}: no trained token after the first, so there is nothing to predict\n"
                "  take the row out"
            )
