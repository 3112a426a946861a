"""Tied weights: a tensor that is stored once and used twice (an embedding that is also the output head).

The architecture declares them (transformers' `_tied_weights_keys`, user -> holder) if the config ties them. ΔW of one
user must not change the other, so the users first get separate tensors ("untied").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LorakitError
from .base import Base
from .renaming import Renaming

# For architectures that transformers does not know (remote code): the head's name, and its embedding's name endings.
_HEAD = "lm_head.weight"
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


def declared(base: Base) -> dict[str, str]:
    """Return the declared ties, user -> holder, by the architecture's names; empty if the config unties them."""
    if _stated(base.config) is False:
        return {}
    cls = _class(base)
    if cls is not None:
        return dict(getattr(cls, "_tied_weights_keys", None) or {})
    holders = [name for name in base.tensors if name.endswith(_EMBEDDINGS)]
    return {_HEAD: holders[0]} if len(holders) == 1 and _stated(base.config) else {}


def find_ties(base: Base, pairs: Mapping[str, str], rename: Renaming) -> dict[str, str]:
    """Return the declared pairs that are tied in these files, by the files' names: stored once, or twice with equal
    bytes.
    """
    prefix = f"{getattr(_class(base), 'base_model_prefix', '')}." if pairs else ""
    ties = {}
    for pair in pairs.items():
        user, holder = (_among(base, rename, prefix, name) for name in pair)
        if user in base.tensors and holder not in base.tensors:
            user, holder = holder, user  # transformers ties to whichever is stored
        if holder in base.tensors and (user not in base.tensors or _equal(base, user, holder)):
            ties[user] = holder
    return ties


def untied(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the model's config with untied embeddings. Raises LorakitError for encoder-decoder models, which cannot be
    untied.
    """
    changed: dict[str, Any] = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    # T5 and related models scale the head's input depending on the tie, or tie regardless of the config.
    if config.get("is_encoder_decoder"):
        raise LorakitError(
            f"{where}: the weights of an encoder-decoder model ({config.get('model_type')}) cannot be untied without "
            "changing what it computes\n"
            "  keep the adapter unmerged, or train one without the embeddings and the head"
        )
    return changed


def _among(base: Base, rename: Renaming, prefix: str, name: str) -> str:
    """Return the files' name of one of the model's parameters."""
    for here in (name, rename(name), name.removeprefix(prefix)):
        if here in base.tensors:
            return here
    return rename(name)


def _stated(config: Mapping[str, Any]) -> bool | None:
    """Return the config's tie_word_embeddings; None if it is not set (each model has its own default)."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner)


def _class(base: Base) -> type | None:
    import transformers  # heavy, and needed only when an adapter touches what may be tied

    return getattr(transformers, base.architecture or "", None)


def _equal(base: Base, first: str, second: str) -> bool:
    a, b = base.tensors[first], base.tensors[second]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x.equal(y) for x, y in zip(a.copied(), b.copied()))
