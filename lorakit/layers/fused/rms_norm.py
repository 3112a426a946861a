"""RMSNorm with a frozen weight as one node, which saves x in its own dtype for backward (see `ops.fused.rms_norm`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.autocast import is_casting
from ...ops.fused.rms_norm import NormVariant, rms_norm
from ...ops.linear import needs_plain
from ..layer import Swapped
from .probe import is_as_probed, mismatch, twin, unknown_attribute


class FusedRmsNorm(Swapped):
    """The mixin in front of the norm's own class, whose forward is called if the node does not apply."""

    weight: Tensor
    lora_norm_variant: tuple[NormVariant, str]  # and the name of the attribute epsilon

    @staticmethod
    def lora_settings(module: nn.Module, match: Any) -> dict[str, object]:
        """Return the attributes to set on a module that can be fused. `match`: what `match` returned."""
        return {"lora_norm_variant": match}

    def forward(self, *args, **kwargs) -> Tensor:
        weight = self.weight
        x = args[0] if len(args) == 1 and not kwargs else None
        if (
            x is None
            or not x.requires_grad
            or not torch.is_grad_enabled()
            or weight.requires_grad
            or x.dtype != weight.dtype
            or weight.dtype == torch.float64
            or not is_as_probed(self)
            or is_casting(x)
            or needs_plain()
        ):
            return super().forward(*args, **kwargs)
        variant, epsilon = self.lora_norm_variant
        return rms_norm(x, weight, getattr(self, epsilon), variant)


def match(module: nn.Module) -> tuple[NormVariant, str] | str | None:
    """Return the variant and epsilon's name if a module can be fused, a string why not if it resembles an RMSNorm, else
    None.
    """
    weight = module._parameters.get("weight")
    if (
        list(module._parameters) != ["weight"]
        or weight is None
        or weight.dim() != 1
        or module._modules
        or module._buffers
    ):
        return None
    epsilons = [name for name, value in module.__dict__.items() if isinstance(value, float)]
    if len(epsilons) != 1:
        return None
    width = weight.shape[0]
    attribute = unknown_attribute(module, [module.__dict__[epsilons[0]], width, (width,), True])
    if attribute is not None:
        return f"it has an attribute '{attribute}' that the fused form does not support"
    why: str | None = None
    for variant in NormVariant:
        why = _mismatch(module, variant, epsilons[0], width)
        if why is None:
            return variant, epsilons[0]
    return why if "rms" in type(module).__name__.lower() else None  # not to report every LayerNorm


def _mismatch(module: nn.Module, variant: NormVariant, epsilon: str, width: int) -> str | None:
    """Say how the node differs from the module; None if outputs are equal bit for bit, also in bf16 (forms differ)."""
    eps = module.__dict__[epsilon]
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        own = nn.Parameter(torch.randn(width, generator=generator, device="cpu").to(dtype), requires_grad=False)
        norm_twin = twin(module, {"weight": own}, {})
        of_gradients = 0.02 if dtype == torch.bfloat16 else 1e-4
        node = functools.partial(rms_norm, weight=own, eps=eps, variant=variant)
        why = mismatch(norm_twin, node, (3, width), dtype, 0.0, of_gradients)
        if why is not None:
            return why
    return None
