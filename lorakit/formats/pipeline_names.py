"""Module names as files have them: with the pipeline's component in front, and CLIP's layers below `text_model`.

    down_blocks.0...to_q (captured from a UNet alone)   ->   unet.down_blocks.0...to_q
    text_encoder.encoder.layers.0.mlp.fc1               ->   text_encoder.text_model.encoder.layers.0.mlp.fc1

transformers 5 has dropped that level from `CLIPTextModel`. Programs that read LoRA files know only the names on the
right, so every format of diffusion models writes those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..adapter.adapter import Adapter
from ..errors import AdapterError
from . import names
from .spellings import COMPONENTS, NATIVE, component_of_first

_WITHOUT = re.compile(r"(text_encoder(?:_\d)?)\.(?=encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)\b)")


def in_pipeline(adapter: Adapter) -> Adapter:
    """The adapter with full names; itself if it has them. AdapterError if one module has two names."""
    component = _component(adapter)
    if component is not None:
        adapter = _renamed(adapter, lambda name: f"{component}.{name}")
    if any(map(_WITHOUT.match, (*adapter.updates, *adapter.saved))):
        adapter = _renamed(adapter, lambda name: _WITHOUT.sub(r"\1.text_model.", name, count=1))
    return adapter


def _component(adapter: Adapter) -> str | None:
    """The component that a part of a pipeline is, where its modules are named from within; None for other adapters.

    The class of the base tells, or without a fingerprint names that only one diffusers model has.
    """
    modules = list(adapter.updates)
    known = (*COMPONENTS, NATIVE)
    if not modules or any(m.split(".")[0] in known or m.startswith(names.PREFIXES) for m in modules):
        return None
    architecture = names.architecture_of(adapter)
    if architecture:
        told = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}.get(architecture)
        return told or ("transformer" if names.model_of_class(architecture) is not None else None)
    found = {component_of_first(m.split(".")[0]) for m in modules}
    return found.pop() if len(found) == 1 else None


def _renamed(adapter: Adapter, change: Callable[[str], str]) -> Adapter:
    updates: dict[str, str] = {}
    for module in adapter.updates:
        if change(module) in updates:
            raise AdapterError(
                f"the adapter has updates for '{updates[change(module)]}' and '{module}', which are two names of one "
                "module\n  keep one of them: adapter.prune([...])"
            )
        updates[change(module)] = module
    saved: Mapping[str, str] = {change(name): name for name in adapter.saved}
    return replace(
        adapter,
        updates={full: adapter.updates[module] for full, module in updates.items()},
        saved={full: adapter.saved[name] for full, name in saved.items()},
    )
