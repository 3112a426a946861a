"""Textual inversion (Gal et al. 2022): new tokens whose embeddings are trained, with an adapter or alone.

    added = add_tokens(pipe, {"<sks>": NewToken(vectors=2, initializer="cat")})
    lk.attach(pipe, lk.LoraConfig(..., trainable_tokens=trainable_tokens(pipe, added)))
    ...                                                      # captions with "<sks>", as text: the encoder is trained
    bundled(lk.capture(pipe), pipe, added).save(...)         # the vectors as the adapter's `embeddings`

A token of several vectors is as many tokens, "<sks>", "<sks>_1", ..., which pipelines of diffusers write into a prompt
that has the first. Only the new rows are trained (`adapter.tokens`): the embedding's other rows keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.adapter import Adapter
from ...adapter.tokens import Tokens
from ...bases.pipeline import as_module, is_text_encoder
from ...errors import ConfigError, TrainError, listing

_CLIP = ("clip_l", "clip_g")  # what files call a token's part for the first and the second CLIP text encoder


@dataclass(frozen=True)
class NewToken:
    """`vectors`: how many rows the token has; `initializer`: text whose tokens' rows they begin as, repeated where it
    has fewer; None: at random, spread as the rows of the vocabulary are.
    """

    vectors: int = 1
    initializer: str | None = None


@dataclass(frozen=True)
class AddedTokens:
    """`ids`: component -> token -> the ids of its vectors, in their order."""

    ids: Mapping[str, Mapping[str, tuple[int, ...]]]


def add_tokens(pipe: Any, tokens: Mapping[str, NewToken]) -> AddedTokens:
    """Give a pipeline's tokenizers new tokens, and its text encoders rows for them.

    CLIP text encoders get them; others (T5, language models) only where there is no CLIP. Random rows come from torch's
    default generator.

    Raises ConfigError for a token that is in a vocabulary already, has no name or no vector, or an initializer that is
    empty; TrainError if the pipeline has no text encoder with a tokenizer. After an error the pipeline is unchanged.
    """
    encoders = _encoders(pipe)
    if not encoders:
        raise TrainError(f"{type(pipe).__name__} has no text encoder with a tokenizer, so it can learn no tokens")
    starts = {
        component: {token: _start(pipe, component, token, new) for token, new in tokens.items()}
        for component in encoders
    }
    return AddedTokens({component: _added(pipe, component, rows) for component, rows in starts.items()})


def trainable_tokens(pipe: Any, added: AddedTokens) -> dict[str, list[int | str]]:
    """Return the tokens' ids by their embedding's module, for `LoraConfig.trainable_tokens`."""
    return {
        _embedding_name(pipe, component): [i for ids in tokens.values() for i in ids]
        for component, tokens in added.ids.items()
    }


def bundled(adapter: Adapter, pipe: Any, added: AddedTokens) -> Adapter:
    """Return the adapter with the trained rows of these tokens as its `embeddings` instead of updates of the embedding.

    Keys are the tokens; with two CLIP text encoders (SDXL) "<sks>.clip_l" and "<sks>.clip_g". Files of kohya's form
    hold them, and `attach` gives them to a pipeline that lacks the tokens.
    """
    updates, embeddings = dict(adapter.updates), dict(adapter.embeddings)
    for component, tokens in added.ids.items():
        name = _embedding_name(pipe, component)
        update = updates.get(name)
        if not isinstance(update, Tokens):
            continue
        row = {token: place for place, token in enumerate(update.ids)}
        new = {i for ids in tokens.values() for i in ids}
        for token, ids in tokens.items():
            key = token if len(added.ids) == 1 else f"{token}.{_CLIP[list(added.ids).index(component)]}"
            embeddings[key] = update.weight[[row[i] for i in ids]].clone()
        rest = [i for i in update.ids if i not in new]
        updates.pop(name)
        if rest:
            updates[name] = replace(update, ids=tuple(rest), weight=update.weight[[row[i] for i in rest]])
    return replace(adapter, updates=updates, embeddings=embeddings)


# ------------------------------------------------------------------------------------- one text encoder


def _encoders(pipe: Any) -> list[str]:
    """Return the text encoders that get tokens."""
    own = [name for name in as_module(pipe).components if is_text_encoder(name) and _tokenizer(pipe, name) is not None]
    clip = [name for name in own if getattr(pipe, name).config.model_type.startswith("clip")]
    return clip or own


def _start(pipe: Any, component: str, token: str, new: NewToken) -> Tensor:
    """Return what a token's rows begin as: [vectors, dim]."""
    tokenizer, weight = _tokenizer(pipe, component), _embedding(pipe, component).weight.detach()
    if not token.strip() or token != token.strip() or " " in token:
        raise ConfigError(f"'{token}' cannot be a token: it is empty or has spaces\n  expected a word such as <sks>")
    if new.vectors < 1:
        raise ConfigError(f"token '{token}' has {new.vectors} vectors; expected at least 1")
    known = tokenizer.get_vocab()
    taken = [name for name in _names(token, new.vectors) if name in known]
    if taken:
        raise ConfigError(
            f"{listing(taken)} is in the vocabulary of the pipeline's {component} already\n"
            f"  choose a token that is new, such as <{token.strip('<>')}-1>"
        )
    if new.initializer is None:
        rows = weight.float()
        return rows.mean(0) + rows.std(0) * torch.randn(new.vectors, weight.shape[1]).to(rows)
    ids = tokenizer(new.initializer, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"the initializer of token '{token}' is empty\n  give a word that is close to it, or none")
    return weight[[ids[i % len(ids)] for i in range(new.vectors)]].float()


def _added(pipe: Any, component: str, rows: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Add tokens to a tokenizer and rows to its text encoder's embedding. Returns the ids of each token."""
    tokenizer, encoder, embedding = _tokenizer(pipe, component), getattr(pipe, component), _embedding(pipe, component)
    names = {token: _names(token, len(vectors)) for token, vectors in rows.items()}
    tokenizer.add_tokens([name for own in names.values() for name in own])
    ids = {token: tuple(tokenizer.convert_tokens_to_ids(own)) for token, own in names.items()}
    old = embedding.weight
    longest = max(old.shape[0], 1 + max(i for own in ids.values() for i in own))
    weight = old.new_zeros(longest, old.shape[1])
    weight[: old.shape[0]] = old.detach()
    for token, own in ids.items():
        weight[list(own)] = rows[token].to(weight)
    # In place of the parameter and not of the module, which may be hooked or shared.
    embedding.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    embedding.num_embeddings = encoder.config.vocab_size = longest
    return ids


def _names(token: str, vectors: int) -> list[str]:
    return [f"{token}_{i}" if i else token for i in range(vectors)]


def _tokenizer(pipe: Any, component: str) -> Any:
    return getattr(pipe, component.replace("text_encoder", "tokenizer"), None)


def _embedding(pipe: Any, component: str) -> Any:
    return getattr(pipe, component).get_input_embeddings()


def _embedding_name(pipe: Any, component: str) -> str:
    embedding = _embedding(pipe, component)
    return next(name for name, module in as_module(pipe).named_modules() if module is embedding)
