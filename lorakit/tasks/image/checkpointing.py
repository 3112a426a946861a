"""Gradient checkpointing of a pipeline's components."""

from __future__ import annotations

from typing import Any

from ...bases.pipeline import PipelineModel
from ...errors import TrainError


def checkpoint(model: PipelineModel) -> None:
    """Let each component with trained parameters recompute its activations in backward. Raises TrainError if one
    cannot.
    """
    component: Any  # a model of diffusers or of transformers
    for name, component in model.components.items():
        if not any(p.requires_grad for p in component.parameters()):
            continue
        if hasattr(component, "enable_gradient_checkpointing"):  # diffusers
            component.enable_gradient_checkpointing()
        elif hasattr(component, "gradient_checkpointing_enable"):  # transformers
            component.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            raise TrainError(
                f"gradient_checkpointing: {name} ({type(component).__name__}) does not have it\n"
                "  remove gradient_checkpointing"
            )
