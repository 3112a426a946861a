"""The level `text_model` of CLIP text encoders: files always have it, `CLIPTextModel` of transformers 5 does not.

    text_encoder.encoder.layers.0.mlp.fc1   ->   text_encoder.text_model.encoder.layers.0.mlp.fc1

Programs that read LoRA files know only the second name, so every format of diffusion models writes that one.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..adapter.adapter import Adapter
from ..errors import AdapterError

_WITHOUT = re.compile(r"(text_encoder(?:_\d)?)\.(?=encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)\b)")


def with_text_model(adapter: Adapter) -> Adapter:
    """The adapter with the level in the names of all its CLIP layers. AdapterError if one module has both names."""
    if not any(map(_WITHOUT.match, (*adapter.updates, *adapter.saved))):
        return adapter
    updates = {_full(module): update for module, update in adapter.updates.items()}
    if len(updates) < len(adapter.updates):
        twice = next(m for m in adapter.updates if _full(m) != m and _full(m) in adapter.updates)
        raise AdapterError(
            f"the adapter has updates for '{twice}' and '{_full(twice)}', which are two names of one module\n"
            "  keep one of them: adapter.prune([...])"
        )
    return replace(adapter, updates=updates, saved={_full(name): t for name, t in adapter.saved.items()})


def _full(name: str) -> str:
    return _WITHOUT.sub(r"\1.text_model.", name, count=1)
