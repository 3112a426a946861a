"""Tokens that a tokenizer knows and a model's embedding has no row for: add them, and check for them.

New rows start at the mean of the old ones, so that the embedding is the same wherever it is given its rows again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LorakitError, listing


def tokens_of(entries: Sequence[str]) -> list[str]:
    """Return the tokens that the setting `add_tokens` names: its entries, or the lines of a file that is its only one.

    Raises ConfigError for a file that cannot be read, an empty token, and one that is named twice.
    """
    tokens, where = list(entries), "add_tokens"
    if len(tokens) == 1 and Path(tokens[0]).is_file():
        where = tokens[0]
        try:
            tokens = [line for line in Path(where).read_text(encoding="utf8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"add_tokens: {where} cannot be read: {error}\n  expected one token a line") from error
    if entries and not (tokens and all(tokens)):
        raise ConfigError(f"{where}: an empty token; expected one token a line, or a list of tokens")
    twice = next((token for i, token in enumerate(tokens) if token in tokens[:i]), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice!r} is named twice")
    return tokens


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> dict[str, int]:
    """Make the tokenizer know these tokens, each as a single id. Returns their ids; those it knew keep theirs."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
    return {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}


def extend(tokenizer: Any, entries: Sequence[str], rows: int, model: str) -> None:
    """Make the tokenizer know the tokens of the setting `add_tokens`.

    `rows`: of the model's embedding. Raises ConfigError for a token that the model knows already.
    """
    tokens, known = tokens_of(entries), tokenizer.get_vocab()
    old = [token for token in tokens if known.get(token, rows) < rows]
    if old:
        raise ConfigError(
            f"add_tokens: {old[0]!r} is a token of {model} already (id {known[old[0]]})\n"
            f"  to train its row: --trainable-tokens {old[0]}"
        )
    add_tokens(tokenizer, tokens)


def restore_tokens(tokenizer: Any, recorded: Mapping[str, int]) -> None:
    """Make the tokenizer know an adapter's added tokens. Raises LorakitError if they get other ids than in training."""
    found = add_tokens(tokenizer, sorted(recorded, key=lambda token: recorded[token]))
    other = [token for token, i in recorded.items() if found[token] != i]
    if other:
        raise LorakitError(
            f"the adapter's token {other[0]!r} had the id {recorded[other[0]]} in training and has {found[other[0]]} "
            "in this tokenizer\n"
            "  use the base and the tokenizer that it was trained on"
        )


def recorded_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Read the added tokens from an adapter's metadata; empty if there are none, or not as we write them."""
    found = metadata.get("added_tokens")
    if not isinstance(found, Mapping) or not all(type(i) is int and i >= 0 for i in found.values()):
        return {}
    return {str(token): i for token, i in found.items()}


def grow(model: Any, rows: int) -> None:
    """Give the model's embedding at least `rows` rows, and its output layer too; tied ones stay tied."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    with torch.random.fork_rng([]):  # transformers draws rows of its own, which are replaced
        model.resize_token_embeddings(rows, mean_resizing=False)
    layers = {id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    with torch.no_grad():
        for layer in layers.values():
            if not layer.weight.is_meta and layer.weight.shape[0] == rows:
                layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)


def check_tokens(items: Iterable[Any], rows: int, tokenizer: Any, model: str) -> None:
    """Raise ConfigError if an item has a token beyond the embedding. `rows`: of the embedding; `model`: its name."""
    for item in items:
        if max(item.ids) < rows:
            continue
        beyond = sorted({token for token in item.ids if token >= rows})
        words = [str(tokenizer.convert_ids_to_tokens(token)) for token in beyond]
        raise ConfigError(
            f"{item.where}: its token {words[0]!r} has the id {beyond[0]}, but the embedding of {model} has {rows:,} "
            f"rows: the tokenizer has more tokens than the model\n"
            f"  add rows and train them: --add-tokens {listing(words, 4)}; or use the model's own tokenizer"
        )
