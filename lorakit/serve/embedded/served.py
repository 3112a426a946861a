"""Which adapters a batch of many can have: the rest is refused by name when it is loaded, with what to do instead.

Refused are virtual tokens (rows with and without them have different lengths inside the model), heads that predict no
text, textual inversion, tokens that the base or its tokenizer lacks, modules whose rows cannot be told apart (`calls`),
and what `attach` refuses: another base, other shapes, missing modules, values that are not finite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.adapter import Adapter
from ...adapter.checks import narrowed
from ...adapter.tokens import Tokens
from ...adapter.update import Update
from ...adapter.virtual_tokens import BODY
from ...errors import AdapterError
from ...layers.expert_weight import ExpertWeight
from ...model.prepared import Prepared
from ..engine import TEXT_TASKS
from .calls import Calls


def check_kind(adapter: Adapter, model: nn.Module, tokenizer: Any) -> None:
    """Raise AdapterError for an adapter that no batch can have, before it is compared with the model's modules."""
    if BODY in adapter.updates:
        raise AdapterError(
            f"it has virtual tokens ({adapter.updates[BODY].variant} tuning), and rows with and without them have "
            "different lengths inside the model, so they cannot be served in one batch\n"
            "  use it by itself: lorakit generate MODEL --adapter PATH; to serve it, train a LoRA instead"
        )
    if adapter.config.task not in TEXT_TASKS:
        raise AdapterError(
            f"it was trained for the task {adapter.config.task}, which predicts no next token\n"
            "  use it with the library or task that it was made for; adapters of causal language models are served"
        )
    if adapter.embeddings:
        raise AdapterError(
            "it has textual-inversion embeddings, which are for pictures\n  use it with lorakit image generate"
        )
    _check_tokens(adapter, model, tokenizer)


def _check_tokens(adapter: Adapter, model: nn.Module, tokenizer: Any) -> None:
    """Raise AdapterError for tokens beyond the model's rows, or that its tokenizer does not have."""
    rows: dict[int, int] = {}
    embeddings: list[Any] = [
        get() for name in ("get_input_embeddings", "get_output_embeddings") if (get := getattr(model, name, None))
    ]
    for module in embeddings:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            rows[weight.shape[1]] = weight.shape[0]
    most = max(rows.values(), default=0)
    fix = "  merge it into the base with its tokens (lorakit merge) and serve the result, or serve a base that has them"
    for name, value in adapter.saved.items():
        more = value.shape[0] if value.dim() == 2 and name.endswith(".weight") else 0
        if value.dim() == 2 and rows.get(value.shape[1], more) < more and _is_vocabulary(model, name):
            raise AdapterError(
                f"it adds tokens: its '{name}' has {more:,} rows, the base's {rows[value.shape[1]]:,}\n{fix}"
            )
    trained = max((u.ids[-1] for u in adapter.updates.values() if isinstance(u, Tokens) and u.ids), default=-1)
    if trained >= most > 0:
        raise AdapterError(f"it adds tokens: it trained the id {trained:,}, and the base has {most:,} rows\n{fix}")
    known = len(tokenizer) if tokenizer is not None else 0
    if trained >= known > 0:
        raise AdapterError(
            f"it adds tokens: it trained the id {trained:,}, and the base's tokenizer has {known:,} tokens\n{fix}"
        )


def _is_vocabulary(model: nn.Module, name: str) -> bool:
    """Whether a parameter is that of the embedding or the output layer."""
    module_name = name.rpartition(".")[0]
    holders = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output"))
    module = dict(model.named_modules()).get(module_name)
    return module is not None and any(module is holder for holder in holders)


def check_modules(prepared: Prepared, model: nn.Module, calls: Calls) -> None:
    """Raise AdapterError for modules whose rows cannot have an adapter of their own."""
    adapted = {name: module for name, module in prepared.modules.items() if not isinstance(module, ExpertWeight)}
    saved = {full.rpartition(".")[0] for full in prepared.saved}
    reasons = {name: why for name, module in adapted.items() if (why := calls.why_not_adapted(module)) is not None}
    reasons |= {name: why for name in saved if (why := calls.why_not_saved(model.get_submodule(name))) is not None}
    if reasons:
        name, why = next(iter(reasons.items()))
        raise AdapterError(
            f"it changes '{name}', whose rows cannot have adapters of their own: {why}\n"
            "  serve the base with it merged (lorakit merge), or leave the module out: adapter.prune(['...'])"
        )


def in_precision(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter with factors of at most the base's precision, in which batches multiply them anyway.

    Other kinds of update keep theirs: they compute with their own values before they are rounded to the base's. Raises
    AdapterError for values that the precision cannot hold.
    """

    def narrow(module: str, update: Update) -> Update:
        def each(field: str, tensor: Tensor) -> Tensor:
            if tensor.dtype.itemsize <= dtype.itemsize:
                return tensor
            return narrowed(tensor, dtype, f"adapter factors of '{module}': {field}")

        own = update.factors
        return update.map(each) if own is update and own.kind == "linear" else update

    return replace(adapter, updates={name: narrow(name, update) for name, update in adapter.updates.items()})
