"""Look up the tokens of a run's settings in its tokenizer: `add_tokens`, and the words among `trainable_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...bases.vocabulary import tokens_of
from ...config import RunSettings, VirtualTokenSettings, part
from ...errors import ConfigError, did_you_mean
from ...methods import method_of


def with_token_ids(config: RunSettings, tokenizer: Any) -> RunSettings:
    """Return the config with ids for tokens and for `prompt_text`, and with the added tokens among those that are
    trained.

    `tokenizer`: it knows `add_tokens` already. Raises ConfigError for a token it does not know.
    """
    method = method_of(config.method)
    text = part(config, VirtualTokenSettings).prompt_text
    if isinstance(text, str):  # as PEFT does, with the special tokens that the tokenizer adds
        config = config.replace(prompt_text=list(tokenizer(text)["input_ids"]))
    own: Any = vars(config)["trainable_tokens"]
    if not own and not config.add_tokens:
        return config
    if "trainable_tokens" not in method.settings.model_fields:
        if method.keeps_base:
            raise ConfigError(
                f"add_tokens: method: {config.method} does not train rows of tokens, so new ones would stay as they "
                "are\n  omit add_tokens, or use method: lora"
            )
        return config.replace(add_tokens=tokens_of(config.add_tokens))
    trained: Any = (
        {name: _ids(tokens, tokenizer) for name, tokens in own.items()}
        if isinstance(own, dict)
        else _ids(own, tokenizer)
    )
    tokens = tokens_of(config.add_tokens)
    if tokens:
        from ...layers.token_targets import INPUT, OUTPUT

        added = _ids(tokens, tokenizer)
        every = list(trained.values()) if isinstance(trained, dict) else [trained]
        # Where they are named already (a resumed run, or one that starts from an adapter), nothing is added.
        if not (isinstance(trained, dict) and every and all(set(added) <= set(ids) for ids in every)):
            named = dict(trained) if isinstance(trained, dict) else {INPUT: trained}
            trained = named | {name: _sorted([*named.get(name, []), *added]) for name in (INPUT, OUTPUT)}
    return config.replace(trainable_tokens=trained, add_tokens=tokens)


def _ids(tokens: Sequence[int | str], tokenizer: Any) -> list[int]:
    found = []
    for token in tokens:
        if isinstance(token, str):
            known = tokenizer.get_vocab()
            if token not in known:
                raise ConfigError(
                    f"trainable_tokens: the tokenizer has no token {token!r}{did_you_mean(token, known)}\n"
                    "  add it: --add-tokens"
                )
            token = known[token]
        found.append(token)
    return _sorted(found)


def _sorted(ids: Sequence[int]) -> list[int]:
    return sorted(set(ids))
