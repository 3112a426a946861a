"""The scaled rotary positions that an adapter was trained with, in a merged model's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..bases.load import load_config
from ..bases.rope import recorded
from ..errors import ConfigError


def with_scaling(config: Mapping[str, Any], folder: Path, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return a base's config.json, which is in `folder`, with its positions scaled as the adapters' record says, in the
    spelling that it has.

    Raises AdapterError if the adapters differ, ConfigError for a base without rotary positions or with others.
    """
    scaling = recorded(adapter.metadata for adapter in adapters)
    if scaling is None:
        return dict(config)
    if not config:
        raise ConfigError(
            f"the adapter was trained with rotary positions scaled by {scaling}, and {folder} has no config.json that "
            "could say so\n  merge it into the base's folder"
        )
    text = load_config(str(folder), rope_scaling=scaling).get_text_config()
    inner = config.get("text_config")
    own = dict(inner) if isinstance(inner, Mapping) else dict(config)
    if own.get("rope_parameters"):
        made = {"rope_parameters": text.rope_parameters}
    else:  # as transformers wrote it before 5
        made = {"rope_scaling": {k: v for k, v in text.rope_parameters.items() if k != "rope_theta"}}
    own |= {**made, "max_position_embeddings": text.max_position_embeddings}
    return {**config, "text_config": own} if isinstance(inner, Mapping) else own
