"""Compute loss and perplexity on held-out rows, over the trained positions only.

    loss = − Σ log p(token | tokens before it) / tokens        perplexity = exp(loss)

The sum is over all trained tokens of all rows, so the result does not depend on how rows are batched, and long rows
count for more than short ones. A row's first token has nothing to be predicted from and is not counted. Training uses
the same loss (`causal_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """A loss in nats per token. `tokens`: trained tokens it averages over."""

    loss: float
    perplexity: float
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields for JSON; an infinite perplexity, which JSON lacks, becomes None."""
        finite = self.perplexity if math.isfinite(self.perplexity) else None
        return {"loss": self.loss, "perplexity": finite, "tokens": self.tokens, "rows": self.rows}


def perplexity(
    model: PreTrainedModel,
    items: Sequence[Item],
    pad_id: int,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Loss:
    """Compute the loss of `items`.

    `on_batch` is called after each batch with its number of rows. Raises ConfigError for a bad batch size or an
    encoder-decoder, DataError for rows that cannot be evaluated, NotFiniteError if a row's loss is not finite.
    """
    _check(model, items, batch_size)
    ordered = sorted(items, key=lambda item: -len(item.ids))  # similar lengths together need little padding
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_id).items()}
            for item, row_loss in zip(rows, row_losses(model, batch).tolist(), strict=True):
                if not math.isfinite(row_loss):
                    raise NotFiniteError(
                        f"{item.row.where}: the loss is {row_loss}\n"
                        "  the model's logits overflow or contain NaN on this row\n"
                        "  load it in bfloat16 or float32 rather than float16, and check the adapter for factors that "
                        "are not finite (lorakit inspect)"
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
            "  expected a decoder-only model, which reads prompt and answer as one text\n"
            "  evaluate this one with --task seq2seq"
        )
    if not items:
        raise DataError("no rows to evaluate\n  expected at least one")
    embedding: Any = model.get_input_embeddings()
    positions, rows = positions_of(model), embedding.weight.shape[0]
    for item in items:
        if max(item.ids) >= rows:
            raise DataError(
                f"{item.row.where}: it has a token with the id {max(item.ids)}, but the model's embedding has {rows:,} "
                "rows\n"
                "  use the model's own tokenizer, or a base that was given rows for its tokens"
            )
        if positions is not None and len(item.ids) > positions:
            raise DataError(
                f"{item.row.where}: {len(item.ids)} tokens, but the model has {positions} positions\n"
                "  shorten the row, or set max_length"
            )
        if not any(item.trained[1:]):
            raise DataError(
                f"{item.row.where}: no trained token after the first, so there is nothing to predict\n  remove the row"
            )
