"""Settings of bottleneck adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import Strict

Activation = Literal["relu", "gelu", "silu", "tanh"]


class BottleneckShape(Strict):
    """What a bottleneck adapter is, beside its size and the modules that it stands behind."""

    reduction: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="bottleneck: the module's outputs per unit of it, instead of a size",
    )
    activation: Activation = Field("relu", description="bottleneck: its non-linearity")
    bottleneck_norm: bool = Field(False, description="bottleneck: a LayerNorm of its own on its input")
    bottleneck_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="bottleneck: factor of what it adds to the module's output"
    )
