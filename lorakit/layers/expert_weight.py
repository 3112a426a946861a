"""The weights of a mixture of experts, as transformers 5 keeps them: 3-D parameters of one module, seen as layers.

    gate_up_proj [E, 2·i, h]   down_proj [E, h, i]        Mixtral, Qwen-MoE, OLMoE, DeepSeek, ...
    gate_up_proj [E, h, 2·i]   down_proj [E, i, h]        transposed: gpt-oss, Aria
    up_proj      [E, i, h]     down_proj [E, h, i]        without a gate: Nemotron-H

`transformers.integrations.moe.use_experts_implementation` gives such a module the attributes is_transposed, has_bias
and has_gate, which say its layout; it is known by them. An adapter may change each of its parameters, which is a layer
of its own to the rest of lorakit: `model.layers.0.mlp.experts.down_proj` has a weight, updates and a rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .layer import Own

_FLAGS = ("is_transposed", "has_bias", "has_gate")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ExpertWeight(Own):
    """One parameter of an experts module, with the interface of a layer. It holds no tensor: `weight` is the experts'.

    Not a child of the experts before an adapter changes it.
    """

    def __init__(self, experts: nn.Module, parameter: str):
        super().__init__()
        self.__dict__["_experts"] = experts  # not as a child, which would be a cycle
        self.parameter = parameter
        self.training = experts.training

    @property
    def experts(self) -> nn.Module:
        """The module that has the parameter."""
        found: nn.Module = self.__dict__["_experts"]
        return found

    @property
    def weight(self) -> Tensor:
        """[E, out, in], or [E, in, out] if transposed."""
        weight: Tensor = getattr(self.experts, self.parameter)
        return weight

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is [E, in, out]."""
        return bool(self.experts.is_transposed)

    def extra_repr(self) -> str:
        return f"{self.parameter}={list(self.weight.shape)}"


def child_of(parameter: str) -> str:
    """Return the name under which an adapted ExpertWeight is a child of its experts."""
    return f"lora_{parameter}"


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the attributes that transformers' experts interface gives."""
    return all(isinstance(module.__dict__.get(flag), bool) for flag in _FLAGS)


def parameters_of(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the parameters that project up and down."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def expert_weights(module: nn.Module) -> Iterator[ExpertWeight]:
    """Yield the parameters of an experts module that can be adapted, as layers; those that are adapted already are its
    children. Nothing for other modules.
    """
    if is_experts(module) and why_not(module) is None:
        for parameter in parameters_of(module):
            own = module._modules.get(child_of(parameter))
            yield own if isinstance(own, ExpertWeight) else ExpertWeight(module, parameter)


def why_not(module: nn.Module) -> str | None:
    """Say why the 3-D parameters of a module cannot be adapted; None if they can, or if it has none."""
    if not is_experts(module):
        stacked = {
            name: list(p.shape)
            for name, p in module._parameters.items()
            if name != "weight" and p is not None and p.dim() > 2 and min(p.shape) > 1
        }
        shapes = ", ".join(f"{name} {shape}" for name, shape in stacked.items())
        return f"its {shapes}: parameters of a module without transformers' experts interface" if stacked else None
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes (expert parallelism)"
    for name in parameters_of(module):
        weight = module._parameters.get(name)
        if weight is None:
            return f"its {name} is no parameter (quantized, or computed from others)"
        if weight.dtype not in _FLOATS:
            return f"its {name} is stored as {str(weight.dtype).removeprefix('torch.')} (quantized)"
        if weight.dim() != 3:
            return f"its {name} has shape {list(weight.shape)}; expected [experts, out, in]"
    return None


def adapted_weight(model: nn.Module, name: str) -> ExpertWeight | None:
    """Return the adapted weight of experts with this full name; None if the name is another module's."""
    holder, _, parameter = name.rpartition(".")
    try:
        experts = model.get_submodule(holder)
    except AttributeError:
        return None
    found = experts._modules.get(child_of(parameter))
    return found if isinstance(found, ExpertWeight) else None
