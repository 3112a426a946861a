"""Check that a model keeps packed rows apart, by what it computes rather than by its name.

Rows of one sequence are told by their `position_ids`, which start from 0 in each. A model must read them, and nothing
of a row may reach the next one: neither attention nor the state of a recurrent layer or a convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.packing import padding
from ...errors import TrainError
from ...generate.eval_mode import evaluating

# Rows of the probe: long enough for a state to matter, short enough to be free.
ROWS, TOKENS = 3, 12


def check_packing(model: Any) -> None:
    """Raise TrainError, naming what the model lacks, if packed rows would not be computed as each one alone."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise TrainError(
            f"packing: {name} has no position_ids, by which a model tells packed rows apart and gives each its own "
            "positions\n"
            "  omit packing; group_by_length keeps padding low"
        )
    difference = _difference(model)
    if difference > torch.finfo(model.dtype).eps ** 0.5:
        kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()))
        layers = f"; its layers are {', '.join(kinds)}" if kinds else ""
        raise TrainError(
            f"packing: {name} does not keep packed rows apart: the logits of a row change by {difference:.1%} when "
            f"other rows precede it in the sequence{layers}\n"
            "  omit packing; group_by_length keeps padding low"
        )


def _difference(model: Any) -> float:
    """Return the relative difference of the logits of packed rows and of the same rows alone."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).repeat(ROWS)[None]
    with evaluating(model), torch.inference_mode():
        together = _logits(model, rows.flatten()[None], positions)[0].unflatten(0, (ROWS, TOKENS))
        alone = _logits(model, rows, None)
    return float((together - alone)[1:].norm() / (alone - alone.mean(-1, keepdim=True))[1:].norm())


def _logits(model: Any, ids: Tensor, positions: Tensor | None) -> Tensor:
    given = {} if positions is None else {"position_ids": positions.to(model.device)}
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **given).logits
    return logits.float()


def saved_padding(batches: Sequence[Sequence[int]]) -> str:
    """Describe what packing saves. `batches`: the sizes of the rows that are computed at once."""
    tokens, padded, packed = padding(batches)
    before, after = 1 - tokens / padded, 1 - tokens / packed
    return f"{after:.1%} of the tokens are padding, {before:.1%} without packing"
