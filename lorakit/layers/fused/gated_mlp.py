"""A gated MLP with adapted linears as one node, down(act(gate(x)) · up(x)) (see `ops.fused.gated_mlp`).

It saves x, gate(x) and up(x) for backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.fused.gated_mlp import ACTIVATIONS, Activation, gated_mlp
from ...ops.projections import Projection
from ...ops.shared_mask import mask_for
from ..bases import base_of
from ..frozen import is_hooked
from ..layer import Swapped
from ..linear import makes_gradients, projection_of
from .probe import RUNS, is_as_probed, mismatch, settings, twin, unknown_attribute

SIZE, FFN = 5, 7  # the widths of the twin that is probed: small, odd and unequal


class Roles(NamedTuple):
    """The names of the children. `gate_up`: gate and up, or one linear that packs both; `function`: the activation that
    the child `act` computes.
    """

    gate_up: tuple[str, ...]
    down: str
    act: str
    function: str
    idle: tuple[str, ...]  # children that do nothing: an Identity, a Dropout of 0

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.gate_up, self.down)


class FusedGatedMlp(Swapped):
    """The mixin in front of the MLP's own class, whose forward is called if the node does not apply."""

    lora_roles: Roles
    lora_act: tuple  # identifies the activation that was probed, see `_as_probed`; it may be replaced later

    @staticmethod
    def lora_settings(module: nn.Module, match: Any) -> dict[str, object]:
        """Return the attributes to set on a module that can be fused. `match`: what `match` returned."""
        return {"lora_roles": match, "lora_act": _as_probed(module._modules[match.act])}

    def forward(self, *args, **kwargs) -> Tensor:
        applies = len(args) == 1 and not kwargs and makes_gradients(self) and is_as_probed(self)
        fusible = _projections(self, args[0]) if applies else None
        if fusible is None:
            return super().forward(*args, **kwargs)
        act, projections, dropout = fusible
        mask = None
        if dropout:
            for name, projection in zip(self.lora_roles.gate_up, projections):
                if projection.A is not None:  # each draws a seed, as it would unfused
                    mask = mask_for(args[0], dropout, self._modules[name])
        return gated_mlp(args[0], projections[:-1], projections[-1], act, mask, dropout)


def _projections(mlp: Any, x: Tensor) -> tuple[Activation, list[Projection], float] | None:
    """Return the activation, the linears as one node can compute them, and their dropout.

    None if nothing is adapted, or a child must be called itself.
    """
    roles, children = mlp.lora_roles, mlp._modules
    act, idle = children.get(roles.act), [children.get(name) for name in roles.idle]
    if act is None or _as_probed(act) != mlp.lora_act or is_hooked(act):
        return None
    if any(child is None or not _does_nothing(child) or is_hooked(child) for child in idle):
        return None
    projections: list[Projection] = []
    dropouts: set[float] = set()
    for name in roles.linears:
        module = children.get(name)
        fusible = None if module is None or is_hooked(module) else projection_of(module, x)
        if fusible is None:
            return None
        projection, dropout = fusible
        if projection.h is not None and projection.h.dim() > 1:  # of groups
            return None
        projections.append(projection)
        if projection.A is not None:
            dropouts.add(dropout)
    if len(dropouts) != 1:
        return None
    return ACTIVATIONS[roles.function], projections, dropouts.pop()


def match(module: nn.Module) -> Roles | str | None:
    """Return the children's roles if a module can be fused, a string why not if it resembles a gated MLP, else None."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    rest = {name: child for name, child in children.items() if name not in linears}
    possible = list(_possible_roles(linears)) if len(linears) in (2, 3) and rest else []
    if not possible:
        return None
    if any(child._modules or child._parameters or child._buffers for child in rest.values()):
        return None
    idle = tuple(name for name, child in rest.items() if _does_nothing(child))
    rest = {name: child for name, child in rest.items() if name not in idle}
    if not rest or all(isinstance(child, nn.Dropout) for child in rest.values()):
        return None
    quantization = next((q for child in linears.values() if (q := base_of(child).quantization) is not None), None)
    if quantization is not None:
        return f"its weights are quantized ({quantization})"
    functions = {name: function for name, child in rest.items() if (function := _function_of(child)) is not None}
    unknown = [f"'{name}' ({type(child).__name__})" for name, child in rest.items() if name not in functions]
    if unknown or len(functions) != 1:
        return (
            f"it has a child {unknown[0]} that the fused form does not support"
            if unknown
            else "it has several activations"
        )
    sizes = {
        size for child in linears.values() for size in (child.in_features, child.out_features, child.out_features // 2)
    }
    attribute = unknown_attribute(module, [*sizes, None])
    if attribute is not None or module._parameters or module._buffers:
        name = attribute or next(iter([*module._parameters, *module._buffers]))
        return f"it has an attribute '{name}' that the fused form does not support"
    why: str | None = None
    ((act, function),) = functions.items()
    for gate_up, down in possible:
        roles = Roles(gate_up, down, act, function, idle)
        found = _mismatch(module, roles, linears)
        if found is None:
            return roles
        why = why or found  # keep the reason for the usual order, which comes first
    return why


def _possible_roles(linears: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the orders of linears that shapes allow: gate and up map the input to the inner size, down maps it back."""
    for order in itertools.permutations(linears):
        gate_up, down = order[:-1], linears[order[-1]]
        inner = down.in_features * (2 if len(gate_up) == 1 else 1)
        if gate_up and all(
            (linears[n].in_features, linears[n].out_features) == (down.out_features, inner) for n in gate_up
        ):
            yield gate_up, order[-1]


def _does_nothing(child: nn.Module) -> bool:
    forward = type(child).forward  # a subclass may have another one
    return forward is nn.Identity.forward or (forward is nn.Dropout.forward and getattr(child, "p", 1) == 0)


def _as_probed(act: nn.Module | None) -> tuple:
    """Return what identifies an activation module and the function it computes."""
    return (act, type(act).forward, settings(act)) if act is not None else ()


def _function_of(child: nn.Module) -> str | None:
    """Return the name of the activation that a child without parameters computes, bit for bit; None if it is none."""
    child_twin = twin(child, {}, {})
    for name, act in ACTIVATIONS.items():
        if mismatch(child_twin, act.forward, (64,), torch.float32, 0.0, 1e-5) is None:
            return name
    return None


def _mismatch(module: nn.Module, roles: Roles, linears: dict[str, nn.Linear]) -> str | None:
    # Compare values in float64 to the last digits, and in bf16 bit for bit, which reveals an upcast in between.
    for dtype, tolerance, of_gradients in ((torch.float64, 1e-12, 1e-12), (torch.bfloat16, 0.0, 0.05)):
        why = _mismatch_in(dtype, module, roles, linears, tolerance, of_gradients)
        if why is not None:
            return why
    return None


def _mismatch_in(
    dtype: torch.dtype,
    module: nn.Module,
    roles: Roles,
    linears: dict[str, nn.Linear],
    tolerance: float,
    of_gradients: float,
) -> str | None:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (SIZE, FFN * (3 - len(roles.gate_up))) for name in roles.gate_up} | {roles.down: (FFN, SIZE)}
    small = {name: _linear(*shapes[name], child.bias is not None, dtype, generator) for name, child in linears.items()}
    mlp_twin = twin(
        module,
        {},
        {
            name: small[name] if name in small else twin(child, {}, {})
            for name, child in module._modules.items()
            if child is not None
        },
    )
    projections = [Projection(small[name].weight, small[name].bias, None, None, 1.0) for name in roles.linears]
    act = ACTIVATIONS[roles.function]
    calls = dict.fromkeys(small, 0)
    for name, child in small.items():
        child.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    why = mismatch(
        mlp_twin,
        lambda x: gated_mlp(x, projections[:-1], projections[-1], act),
        (2, 3, SIZE),
        dtype,
        tolerance,
        of_gradients,
    )
    bypassed = next((name for name, count in calls.items() if count != RUNS), None)
    return why or (
        f"it uses the weight of '{bypassed}' without calling it exactly once" if bypassed is not None else None
    )


def _linear(size_in: int, size_out: int, bias: bool, dtype: torch.dtype, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(size_in, size_out, bias, device="cpu", dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float64))
    return linear
