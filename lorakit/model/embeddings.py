"""Textual-inversion embeddings of attached adapters: new tokens of a pipeline, and their rows in its text encoders.

A token of several vectors is as many tokens, `sks`, `sks_1`, `sks_2`, as in diffusers' `load_textual_inversion`, whose
pipelines write all of them into a prompt that has the first. A token is for every text encoder whose embedding has its
width; `sks.clip_l` and `sks.clip_g`, as files of SDXL have them, are the token `sks` of one of them.

Tokenizer and embedding are replaced, and put back as they were when the last such adapter is detached. They do not
depend on which adapters are active: a token has an effect in the prompts that have it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..bases.pipeline import PipelineModel, is_text_encoder
from ..errors import AdapterError, StateError, listing
from ..layers.layer import LoraLayer
from ..layers.saved import saved_of
from .state import State, Vocabulary

_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def embeddings_for(model: nn.Module, adapter: Adapter, strict: bool, skipped: dict[str, str]) -> list[str]:
    """Return the adapter's tokens that the model can take; adds the others to `skipped`, with the reason.

    Raises AdapterError for others if `strict`, StateError for a token that is taken, or if the rows cannot be added.
    """
    taken, reasons = [], {}
    for key, vectors in adapter.embeddings.items():
        if not isinstance(model, PipelineModel):
            reasons[key] = "it needs a pipeline, with its tokenizer"
            continue
        components = list(_components(model, key, vectors))
        if not components:
            widths = {c: _embedding(model, c).weight.shape[1] for c in _text_encoders(model)}
            reasons[key] = (
                f"no text encoder takes vectors of {vectors.shape[-1]} elements (there are {widths or 'none'})"
            )
            continue
        for component in components:
            _check_free(model, component, key, vectors)
        taken.append(key)
    if reasons and strict:
        key, why = next(iter(reasons.items()))
        raise AdapterError(
            f"the adapter has textual-inversion embeddings ({listing(reasons, 3)}) that cannot be attached: "
            f"'{key}': {why}\n"
            "  attach it to the pipeline it is for; strict=False attaches the rest and lists these"
        )
    skipped |= {f"embedding '{key}'": why for key, why in reasons.items()}
    return taken


def put_in_place(model: nn.Module, state: State) -> None:
    """Give a pipeline's tokenizers and text encoders the tokens of all attached adapters, and no other."""
    if not isinstance(model, PipelineModel):
        return
    rows: dict[str, dict[str, Tensor]] = {component: {} for component in state.vocabularies}
    for attached in state.adapters.values():
        for key, vectors in attached.embeddings.items():
            for component in _components(model, key, vectors):
                rows.setdefault(component, {}).update(_tokens(key, vectors))
    for component, own in rows.items():
        if component in state.vocabularies and list(own) == state.vocabularies[component].tokens:
            continue
        _restore(model, component, state.vocabularies.pop(component, None))
        if own:
            state.vocabularies[component] = _add(model, component, own)


def _add(model: PipelineModel, component: str, rows: Mapping[str, Tensor]) -> Vocabulary:
    """Add tokens to a copy of the tokenizer, and their rows to a copy of the embedding. Returns what they replace."""
    embedding, name = _embedding(model, component), _tokenizer_name(component)
    tokenizer, weight = getattr(model.pipe, name), embedding.weight
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(list(rows))
    ids = longer.convert_tokens_to_ids(list(rows))
    added = weight.new_zeros(max(weight.shape[0], *(i + 1 for i in ids)), weight.shape[1])
    added[: weight.shape[0]] = weight.detach()
    added[torch.tensor(ids, device=added.device)] = torch.stack(list(rows.values())).to(added)
    _use(model, component, longer, nn.Parameter(added, requires_grad=False))
    return Vocabulary(tokenizer, weight, embedding.weight, list(rows))


def _restore(model: PipelineModel, component: str, before: Vocabulary | None) -> None:
    if before is not None:
        _use(model, component, before.tokenizer, before.weight)


def _use(model: PipelineModel, component: str, tokenizer: Any, weight: nn.Parameter) -> None:
    embedding: Any = _embedding(model, component)
    live: Any = model.components[component]
    setattr(model.pipe, _tokenizer_name(component), tokenizer)
    embedding.weight = weight
    embedding.num_embeddings = weight.shape[0]
    if hasattr(live.config, "vocab_size"):
        live.config.vocab_size = weight.shape[0]


def _check_free(model: PipelineModel, component: str, key: str, vectors: Tensor) -> None:
    """Raise StateError if a token is in the vocabulary already, or the embedding cannot be given more rows."""
    known = getattr(model.pipe, _tokenizer_name(component)).get_vocab()
    taken = next((token for token in _tokens(key, vectors) if token in known), None)
    if taken is not None:
        raise StateError(
            f"the adapter's token '{taken}' is in the vocabulary of the pipeline's {component} already\n"
            "  detach the adapter that has it, or give it another name: dataclasses.replace(adapter, embeddings={...})"
        )
    embedding = _embedding(model, component)
    if isinstance(embedding, LoraLayer) or saved_of(embedding) is not None:
        raise StateError(
            f"the token embedding of the pipeline's {component} is adapted, so it cannot be given the rows of '{key}'\n"
            "  attach the adapter with embeddings first"
        )


def _components(model: PipelineModel, key: str, vectors: Tensor) -> Iterator[str]:
    """The text encoders that a token's vectors are for."""
    part = _PARTS.get(key.rpartition(".")[2])
    for component in _text_encoders(model):
        fits = _embedding(model, component).weight.shape[1] == vectors.shape[-1]
        if fits and part in (None, component):
            yield component


def _text_encoders(model: PipelineModel) -> list[str]:
    return [
        name
        for name in model.components
        if is_text_encoder(name) and getattr(model.pipe, _tokenizer_name(name), None) is not None
    ]


def _tokens(key: str, vectors: Tensor) -> dict[str, Tensor]:
    """The tokens that a token's vectors [n, dim] or [dim] are, each with its row."""
    token, _, part = key.rpartition(".")
    token = token if part in _PARTS else key
    return {f"{token}_{i}" if i else token: row for i, row in enumerate(vectors.reshape(-1, vectors.shape[-1]))}


def _embedding(model: PipelineModel, component: str) -> Any:
    live: Any = model.components[component]
    return live.get_input_embeddings()


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")
