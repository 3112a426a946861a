"""The scaled rotary positions that an adapter was trained with, in a merged model's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter.adapter import Adapter
from ..bases.rope import parsed, recorded
from ..errors import ConfigError

_FULL = "full_attention"


def with_scaling(config: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return a base's config.json with its positions scaled as the adapters' record says, in the spelling that it has.

    Raises AdapterError if the adapters differ, ConfigError for a base without rotary positions or with others.
    """
    scaling = recorded(adapter.metadata for adapter in adapters)
    if scaling is None:
        return dict(config)
    if isinstance(config.get("text_config"), Mapping):
        return {**config, "text_config": with_scaling(config["text_config"], adapters)}
    kind, factor = parsed(scaling)
    positions = config.get("max_position_embeddings")
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    every = dict(config.get(field) or {})
    own = dict(every.get(_FULL) or every)  # Gemma's sliding layers have positions of their own
    if positions is None or not (own or "rope_theta" in config):
        raise ConfigError(
            f"the adapter was trained with rotary positions scaled by {scaling}, and the base's config.json has none "
            "that can be scaled\n  merge it into the base that it was trained on"
        )
    known = own.get("rope_type", own.get("type", "default"))
    if (known, own.get("factor")) == (kind, factor):
        return dict(config)
    if known != "default":
        raise ConfigError(
            f"the adapter was trained with rotary positions scaled by {scaling}, and those of the base are scaled by "
            f"{known}:{own.get('factor')}\n  merge it into the base that it was trained on"
        )
    original = {"original_max_position_embeddings": positions} if kind == "yarn" else {}
    own |= {"rope_type": kind, "factor": factor, **original}
    made = {**every, _FULL: own} if _FULL in every else own
    return {**config, field: made, "max_position_embeddings": int(positions * factor)}
