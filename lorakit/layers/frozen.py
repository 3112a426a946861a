"""Which linears are just x Wᵀ + b with a weight that stays as it is,
so that base and updates may be one autograd node.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.autocast import is_casting

Plain = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]


def frozen_linear(module: nn.Module, x: Tensor) -> Plain | None:
    """Weight and bias, if they are frozen plain tensors, the weight of x's dtype, and nothing is cast; else None. The
    forward must be nn.Linear's own.
    """
    found = plain_weight(module)
    return found if found is not None and x.dtype == found[0].dtype and not is_casting(x) else None


def plain_weight(module: nn.Module) -> Plain | None:
    """Weight and bias, if they are frozen plain tensors: not quantized, sharded, or computed by a parametrization."""
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
    """Whether something waits for the module's own call: hooks, or accelerate's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
