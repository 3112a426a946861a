"""Merge trained tokens into checkpoint files: rows for new tokens, the vocabulary's size, and the tokenizer.

A weight that gets rows is written anew, with the mean of the old rows where no token was trained; the same as a live
model is given (`bases.vocabulary.grow`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..adapter.update import Update
from ..bases.vocabulary import recorded_tokens, restore_tokens
from ..errors import AdapterError
from ..io.stream import Slot
from .base import Base

# What transformers' models call an output layer of their own.
_HEADS = ("lm_head.weight", "embed_out.weight")


def grown(update: Update, slot: Slot) -> Tensor | None:
    """Return the weight with rows for the update's tokens, in the file's dtype; None if it has them all already."""
    if not isinstance(update, Tokens) or len(slot.shape) != 2 or update.ids[-1] < slot.shape[0]:
        return None
    before, dim = slot.shape
    if dim != update.weight.shape[1]:
        return None
    old = torch.cat([block for _, block in slot.rows()]).reshape(slot.shape)
    new = old.mean(0).expand(update.ids[-1] + 1 - before, dim)
    weight = torch.cat([old, new])
    weight[list(update.ids)] = update.weight.to(weight.dtype)
    return weight.to(slot.torch_dtype)


def check_heads(base: Base, values: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if the embedding gets rows, and an output layer of its own does not."""
    for name, value in values.items():
        slot = base.tensors.get(name)
        if slot is None or tuple(value.shape) == slot.shape:
            continue
        short = next((n for n in base.tensors if n.endswith(_HEADS) and n not in values), None)
        if short is not None and base.tensors[short].shape[0] == slot.shape[0]:
            raise AdapterError(
                f"the adapter has {value.shape[0] - slot.shape[0]} tokens that the base has no row for, and no rows of "
                f"them for its output layer '{short}'\n"
                f"  give the base rows first: model.resize_token_embeddings({value.shape[0]}), save it, and merge into "
                "that"
            )


def with_vocabulary(config: Mapping[str, Any], before: int, rows: int) -> dict[str, Any]:
    """Return a model's config with another vocabulary size, in nested configs too."""
    inner = {k: with_vocabulary(v, before, rows) for k, v in config.items() if isinstance(v, dict)}
    own = {"vocab_size": rows} if config.get("vocab_size") == before else {}
    return {**config, **inner, **own}


def keep_tokens(folder: Path, adapters: Iterable[Adapter]) -> None:
    """Write the base's tokenizer in `folder` with the tokens that adapters added. Raises LorakitError if that fails."""
    from ..bases.load import load_tokenizer

    added = [tokens for adapter in adapters if (tokens := recorded_tokens(adapter.metadata))]
    if not added or not (folder / "config.json").is_file():
        return
    tokenizer = load_tokenizer(str(folder))
    for tokens in added:
        restore_tokens(tokenizer, tokens)
    tokenizer.save_pretrained(folder)
