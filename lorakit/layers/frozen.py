"""Which linears are just x Wᵀ + b with a weight that stays as it is,
so that base and updates may be one autograd node.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.autocast import is_casting


def is_frozen_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether the weight is a frozen plain tensor of x's dtype, and nothing is cast. The forward must be nn.Linear's
    own.
    """
    return (
        is_plain_weight(module)
        and x.dtype == module._parameters["weight"].dtype  # type: ignore[union-attr]
        and not is_casting(x)
    )


def is_plain_weight(module: nn.Module) -> bool:
    """Whether weight and bias are frozen plain tensors: not quantized, sharded, or computed by a parametrization."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) in (nn.Parameter, Tensor)
        and "bias" in module._parameters
        and not weight.requires_grad  # type: ignore[union-attr]
        and (bias is None or not bias.requires_grad)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for the module's own call: hooks, or accelerate's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
