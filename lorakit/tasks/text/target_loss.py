"""The loss of an encoder-decoder over its targets: Σ −log p(token | source, tokens before it), for each row.

The decoder's input is the target shifted by the model's own rule (`prepare_decoder_input_ids_from_labels`): T5 and BART
begin with a start token, mBART with the target's language. Padding is not counted.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TrainError
from ...ops import IGNORE_INDEX
from .causal_loss import POSITIONS_MULTIPLE, position_losses


def target_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed loss of each row: [rows], float32. `batch`: as `data.pairs.collate_pairs` makes it."""
    inputs, labels = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
    shifted = decoder_inputs(model, labels)
    if shifted is None:  # a model that shifts only what it is given as labels, and computes the mean loss besides
        logits = model(**inputs, labels=labels, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(labels.shape).sum(1)
    selected = labels != IGNORE_INDEX
    padding = -int(selected.sum()) % POSITIONS_MULTIPLE
    if padding:  # their label gives them a loss of zero
        selected = selected.clone()
        selected.view(-1)[(~selected).view(-1).nonzero()[:padding, 0]] = True
    losses = position_losses(model, inputs | {"decoder_input_ids": shifted}, selected, labels[selected])
    return losses.new_zeros(selected.shape).masked_scatter(selected, losses).sum(1)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor | None:
    """Return the labels shifted to the right by the model's own rule, [rows, length]; None if it shows none.

    Raises TrainError for a model whose config has no start token.
    """
    inner = getattr(model, "module", model)  # DistributedDataParallel
    shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return None
    try:
        shifted: Tensor = shift(labels=labels)
    except (ValueError, TypeError) as error:  # None instead of a token
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"{type(inner).__name__} cannot shift its targets: {reason}\n"
            "  set decoder_start_token_id and pad_token_id in the model's config.json"
        ) from error
    return shifted
