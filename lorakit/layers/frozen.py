"""Recognize linears that compute just x Wᵀ + b with a frozen weight, so that one node can add an update to them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.autocast import is_casting

Plain = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]


def frozen_linear(module: nn.Module, x: Tensor) -> Plain | None:
    """Return weight and bias if they are frozen plain tensors, in x's dtype and without autocast; None otherwise.

    The caller must know that the module's forward is nn.Linear's own.
    """
    plain = plain_weight(module)
    return plain if plain is not None and x.dtype == plain[0].dtype and not is_casting(x) else None


def plain_weight(module: nn.Module) -> Plain | None:
    """Return weight and bias if they are frozen plain tensors; None if they are quantized, sharded or parametrized."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        weight is None
        or type(weight) not in (nn.Parameter, Tensor)
        or "bias" not in parameters
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None
    return weight, bias


def is_hooked(module: nn.Module) -> bool:
    """Whether the module must be called itself, for its hooks or for accelerate's replacement of its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
