"""Gradient checkpointing of transformers' models for pictures and sound."""

from __future__ import annotations

from typing import Any

from ...errors import TrainError


def checkpoint(model: Any) -> None:
    """Let the model recompute activations in backward. Raises TrainError if its class cannot.

    Inputs need no gradient for it: `use_reentrant=False` finds the parameters inside that are trained.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainError(
            f"gradient_checkpointing: {type(model).__name__} does not support it in transformers\n"
            "  remove it, and lower micro_batch instead"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
