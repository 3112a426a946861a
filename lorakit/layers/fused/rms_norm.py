"""RMSNorm with a frozen weight, as one node (see `ops.fused.rms_norm`): it keeps x as it is for backward, not a float32
copy of it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.autocast import is_casting
from ...ops.fused.rms_norm import Form, rms_norm
from ...ops.linear import needs_plain
from ..layer import Swapped
from .probe import is_as_probed, misfit, twin, unknown_attribute


class FusedRmsNorm(Swapped):
    """In front of the norm's own class, whose forward is called wherever the node does not apply."""

    weight: Tensor
    lora_form: tuple[Form, str]  # and the name of epsilon

    @staticmethod
    def lora_settings(module: nn.Module, found: Any) -> dict[str, object]:
        """What to set on a module that `match` says can be fused."""
        return {"lora_form": found}

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
        form, epsilon = self.lora_form
        return rms_norm(x, weight, getattr(self, epsilon), form)


def match(module: nn.Module) -> tuple[Form, str] | str | None:
    """The form and epsilon's name if a module can be fused; why it cannot, if it looks like an RMSNorm; None if it does
    not.
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
    odd = unknown_attribute(module, [module.__dict__[epsilons[0]], width, (width,), True])
    if odd is not None:
        return f"has an attribute '{odd}' that the fused form does not know"
    why: str | None = None
    for form in Form:
        why = _misfit(module, form, epsilons[0], width)
        if why is None:
            return form, epsilons[0]
    return why if "rms" in type(module).__name__.lower() else None  # a LayerNorm is no RMSNorm that failed


def _misfit(module: nn.Module, form: Form, epsilon: str, width: int) -> str | None:
    """Bits must be equal where B is zero, in 16 bits too: there the forms differ."""
    eps = module.__dict__[epsilon]
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        own = nn.Parameter(torch.randn(width, generator=generator, device="cpu").to(dtype), requires_grad=False)
        made = twin(module, {"weight": own}, {})
        gradients_only = 0.02 if dtype == torch.bfloat16 else 1e-4
        why = misfit(
            made, functools.partial(rms_norm, weight=own, eps=eps, form=form), (3, width), dtype, 0.0, gradients_only
        )
        if why is not None:
            return why
    return None
