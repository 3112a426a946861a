"""Other ranks for some modules, each with the scale that it had."""

from __future__ import annotations

from collections.abc import Mapping

from ...config import LoraConfig


def redistributed(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config with these ranks by module, and the alphas with which each module keeps its scale."""
    alphas = {}
    for m, rank in ranks.items():
        ratio = rank / config.rank_of(m)
        alphas[m] = config.alpha_of(m) * (ratio**0.5 if config.rslora else ratio)
    return config.replace(
        rank_pattern={f"^{m}": rank for m, rank in ranks.items() if rank != config.rank},
        alpha_pattern={f"^{m}": alpha for m, alpha in alphas.items() if alpha != config.alpha},
    )
