"""How kinds of update are called on a screen."""

from __future__ import annotations

# Kinds of update that are not LoRA, as one calls them.
KINDS = {
    "bottleneck": "bottleneck",
    "ia3": "(IA)³",
    "loha": "LoHa",
    "lokr": "LoKr",
    "vera": "VeRA",
    "dense": "dense",
    "tokens": "tokens",
}
