"""Longer contexts than a base was trained for, by scaling its rotary positions.

    yarn:4      YaRN (Peng et al. 2023): high frequencies stay, low ones are stretched by 4, attention is sharpened
    linear:4    position interpolation (Chen et al. 2023): every position is divided by 4

The base is loaded with the scaling in its config, in the form of transformers (`rope_parameters`), and with that many
times its positions. An adapter is trained for a scaling and is right with that one only, so it is recorded in its
metadata (`rope_scaling`), read by the commands that load a base for it, and checked when it is attached.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import AdapterError, ConfigError, LorakitWarning, did_you_mean

RECORD = "rope_scaling"  # in an adapter's metadata
SCALED = "_lorakit_rope_scaling"  # the attribute of a model that was loaded with a scaling
KINDS = ("yarn", "linear")
_UNLIMITED = 10_000_000  # a tokenizer without a limit says 10^30
_FULL = "full_attention"  # the layers whose positions are scaled, where sliding ones have their own


def parsed(text: str) -> tuple[str, float]:
    """Return (kind, factor) of "yarn:4". Raises ConfigError for another kind, or a factor of at most 1."""
    kind, colon, number = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(
            f"rope_scaling: there is no '{kind}'{did_you_mean(kind, KINDS)}\n"
            f"  expected one of {', '.join(f'{kind}:4' for kind in KINDS)}, with the factor by which contexts grow"
        )
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if not colon or not 1 < factor < float("inf"):
        raise ConfigError(f"rope_scaling: {text}: expected a factor above 1, such as {kind}:4")
    return kind, factor


def scaled(config: Any, scaling: str | None, name: str) -> Any:
    """Return a base's transformers config with its rotary positions scaled; the config itself for None.

    `name`: the base's, for errors. Raises ConfigError for a base without rotary positions, or with scaled ones already.
    """
    if scaling is None:
        return config
    kind, factor = parsed(scaling)
    scaling = f"{kind}:{factor:g}"
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    positions = getattr(text, "max_position_embeddings", None)
    if not rope or not positions:
        raise ConfigError(
            f"rope_scaling: {name} ({type(config).__name__}) has no rotary positions that could be scaled\n"
            "  omit rope_scaling, and keep to the positions it has"
        )
    of_layers = text.nested_rope_parameter_keys(rope) if hasattr(text, "nested_rope_parameter_keys") else []
    if of_layers and _FULL not in of_layers:
        raise ConfigError(
            f"rope_scaling: {name} has rotary positions of its own for {', '.join(of_layers)}, and none of them is "
            f"{_FULL}\n  omit rope_scaling"
        )
    own = rope[_FULL] if of_layers else rope
    if scaling_of(config) == scaling:
        return config
    known = own.get("rope_type", "default")
    if known != "default":
        raise ConfigError(
            f"rope_scaling: the positions of {name} are scaled already ({known}, factor {own.get('factor')}): its "
            f"{positions:,} positions include that\n  omit rope_scaling"
        )
    made = {**own, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        made["original_max_position_embeddings"] = positions
    text.rope_parameters = {**rope, _FULL: made} if of_layers else made
    text.max_position_embeddings = int(positions * factor)
    return config


def scaling_of(config: Any) -> str | None:
    """Return the scaling of a transformers config's rotary positions, as "yarn:4"; None for none, or another kind."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    own = rope.get(_FULL) or rope
    kind, factor = own.get("rope_type"), own.get("factor")
    return f"{kind}:{factor:g}" if kind in KINDS and factor else None


def stretch(tokenizer: Any, scaling: str | None) -> None:
    """Scale the longest text that a tokenizer says its model takes, as the positions of the model are."""
    if scaling is not None and tokenizer.model_max_length < _UNLIMITED:
        tokenizer.model_max_length = int(tokenizer.model_max_length * parsed(scaling)[1])


def recorded(metadata: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the scaling that adapters with this metadata were trained with. Raises AdapterError if they differ."""
    found = {record_of(each) for each in metadata}
    if len(found) > 1:
        raise AdapterError(
            "the adapters were trained with different rotary positions: "
            + ", ".join(sorted(scaling or "those of the base" for scaling in found))
            + "\n  use them one at a time"
        )
    return next(iter(found), None)


def record_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the scaling in an adapter's metadata. Raises AdapterError if it is not one."""
    scaling = metadata.get(RECORD)
    if scaling is None:
        return None
    try:
        kind, factor = parsed(str(scaling))
    except ConfigError as error:
        raise AdapterError(f"the adapter's record of its base's positions is damaged: {error}") from error
    return f"{kind}:{factor:g}"


def with_scaling(model: Any, metadata: Mapping[str, Any], trainable: bool) -> Mapping[str, Any]:
    """Return a loaded adapter's metadata, with the scaling of the model that it is trained on from now.

    Warns of an adapter that is not trained on, and was made for positions that are not scaled.
    """
    scaling = getattr(model, SCALED, None)
    if scaling is None or RECORD in metadata:
        return metadata
    if trainable:
        return {**metadata, RECORD: scaling}
    warnings.warn(
        f"this base's rotary positions are scaled by {scaling}, and the adapter was trained without: it will not "
        "compute as it did in training",
        LorakitWarning,
        stacklevel=5,
    )
    return metadata


def check_scaling(config: Any, metadata: Mapping[str, Any]) -> None:
    """Raise AdapterError unless a base's positions are scaled as those that an adapter was trained with.

    `config`: the base's; None for a model that is not of transformers.
    """
    expected = record_of(metadata)
    if expected is None:
        return
    found = None if config is None else scaling_of(config)
    if found != expected:
        raise AdapterError(
            f"the adapter was trained with rotary positions scaled by {expected}, and those of this base are "
            f"{found or 'not scaled'}\n"
            f'  load the base with them: lorakit.load_base(..., rope_scaling="{expected}"); or skip this check: '
            "attach(..., force=True)"
        )
