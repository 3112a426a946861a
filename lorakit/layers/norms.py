"""Find a model's normalization layers by what they are: LayerNorm, RMSNorm and their like, GroupNorm.

A norm has a weight for each feature, [features], maybe a bias of the same shape, a small number that keeps it from
dividing by zero (`eps`, `variance_epsilon`), and nothing else: no modules inside, and no running statistics, which an
adapter cannot hold (BatchNorm).
"""

from __future__ import annotations

from torch import nn

from .saved import CHILD
from .targets import module_names, shortest_endings

_EPS = ("eps", "variance_epsilon", "epsilon")


def norms(model: nn.Module) -> list[str]:
    """Return name endings of all norms that have a weight, as `LoraConfig.save_modules` takes them."""
    names = module_names(model)
    found = [name for name, module in names.items() if is_norm(module)]
    return shortest_endings(found, list(names)) if found else []


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer with a weight."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and own.keys() <= {"weight", "bias"}
        and all(p.shape == weight.shape for p in own.values())
        and not module._buffers
        and not module._modules.keys() - {CHILD}
        and any(isinstance(getattr(module, name, None), float) for name in _EPS)
    )
