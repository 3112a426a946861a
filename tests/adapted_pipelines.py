"""Tiny pipelines with two adapters, "ink" and "neon", that change their pictures visibly.

"neon" has the text encoders' out_proj: of a kohya file without it, diffusers cannot tell the format.
"""

from __future__ import annotations

from typing import Any

from tiny import randomise_factors

from lorakit.bases.pipeline import as_module, components_of
from lorakit.config import LoraConfig
from lorakit.model.activate import activate
from lorakit.model.attach import attach

TARGETS = {"ink": ["to_q", "to_v", "ff.net.2"], "neon": ["to_k", "to_out.0", "conv1", "q_proj", "out_proj"]}


def with_adapters(pipe: Any) -> Any:
    """Attach both adapters with random factors; none is active."""
    for name, targets in TARGETS.items():
        components = ["unet"] if name == "ink" else list(components_of(pipe))
        attach(as_module(pipe), LoraConfig(rank=3, targets=targets, components=components), name=name)
    randomise_factors(as_module(pipe), size=0.2)
    activate(as_module(pipe), None)
    return pipe
