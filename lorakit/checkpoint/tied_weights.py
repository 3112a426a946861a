"""Tied weights: a tensor that the files hold once and the model uses twice (the embedding that is also the output
head).

Which ones, the architecture says (transformers' `_tied_weights_keys`, user -> holder), if the config has them tied. ΔW
for one of the users cannot go into the one tensor: the users must first get tensors of their own ("untied").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LorakitError
from .base import Base
from .names import Renaming

# For architectures that transformers does not know (remote code): the head's name, and how its embedding's name may
# end.
_HEAD = "lm_head.weight"
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


def declared(base: Base) -> dict[str, str]:
    """User -> holder as the architecture names them, or nothing if the config says that nothing is tied."""
    if _stated(base.config) is False:
        return {}
    cls = _class(base)
    if cls is not None:
        return dict(getattr(cls, "_tied_weights_keys", None) or {})
    holders = [name for name in base.tensors if name.endswith(_EMBEDDINGS)]
    return {_HEAD: holders[0]} if len(holders) == 1 and _stated(base.config) else {}


def find_ties(base: Base, pairs: Mapping[str, str], rename: Renaming) -> dict[str, str]:
    """Those of the declared pairs that hold in these files, in the files' names: stored once, or twice with equal
    bytes.
    """
    prefix = f"{getattr(_class(base), 'base_model_prefix', '')}." if pairs else ""
    ties = {}
    for pair in pairs.items():
        user, holder = (_among(base, rename, prefix, name) for name in pair)
        if user in base.tensors and holder not in base.tensors:
            user, holder = holder, user  # transformers ties to whichever is there
        if holder in base.tensors and (user not in base.tensors or _equal(base, user, holder)):
            ties[user] = holder
    return ties


def untied(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The config of the same model with nothing tied. LorakitError for a model that cannot be untied."""
    changed: dict[str, Any] = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    # T5 and its kin scale the head's input by whether it is tied, or tie whatever the config says.
    if config.get("is_encoder_decoder"):
        raise LorakitError(
            f"{where}: the weights of an encoder-decoder model ({config.get('model_type')}) cannot be untied without "
            "changing what it computes\n"
            "  keep the adapter unmerged, or train one without the embeddings and the head"
        )
    return changed


def _among(base: Base, rename: Renaming, prefix: str, name: str) -> str:
    """A model's own name as the files have it."""
    for here in (name, rename(name), name.removeprefix(prefix)):
        if here in base.tensors:
            return here
    return rename(name)


def _stated(config: Mapping[str, Any]) -> bool | None:
    """What the config says of tied word embeddings, if anything (each model has a default of its own)."""
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
