"""Test whether a module computes what a fused node computes: run its own forward on small random inputs, and compare
values and gradients.

This needs no list of class names or releases. A probe sees only the code that runs, so it is designed to be hard to
fool: it runs in train mode (which reveals dropout) and in eval mode, with inputs of three magnitudes (which reveals
clamping), on a twin of the module with small weights (which leaves the user's module alone, and works on the meta
device). A module with any attribute that the node does not support is rejected before that.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..layer import Swapped

SIZES = (1e-3, 1.0, 1e3)
MODES = (True, False)  # `training`: True reveals dropout, False a shortcut for evaluation
RUNS = len(SIZES) * len(MODES)  # of a module's forward in one probe

Run = Callable[[Tensor], Tensor]

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# Attributes that libraries set on modules and no forward reads.
_HARMLESS = frozenset({"config", "_is_hf_initialized", "layer_idx"})


def is_as_probed(module: Swapped) -> bool:
    """Whether a fused module's own class still has the forward that was probed, which may have been patched since."""
    cls = type(module)
    own: Any = cls.__bases__[1]
    return own.forward is cls.lora_probed


Configs = dict[int, tuple]  # id -> contents of one model's configs, read once rather than for each module


def settings(module: nn.Module, configs: Configs | None = None) -> tuple:
    """Return a key of all attributes of a module that its forward may depend on."""
    configs = {} if configs is None else configs
    own = tuple(
        (k, _known(k, v, configs))
        for k, v in module.__dict__.items()
        if k not in _OF_EVERY_MODULE and not k.startswith(("lora_", "_lora"))
    )
    return own, tuple((name, None if b is None else b.shape) for name, b in module._buffers.items())


class Identity(NamedTuple):
    """Stands for an object that is compared by identity. The id may be reused once the object is freed."""

    id: int


def outlives_its_module(settings: object) -> bool:
    """Whether settings remain valid after the module they were read from is freed."""
    if isinstance(settings, tuple):
        return not isinstance(settings, Identity) and all(map(outlives_its_module, settings))
    return True


def _known(name: str, value: object, configs: Configs) -> object:
    """Return a key of an attribute's value: plain values and configs by their contents, all else by identity."""
    if isinstance(value, functools.partial):
        return value.func, repr(value.args), repr(value.keywords)
    if isinstance(value, _FUNCTIONS):
        return value
    if name == "config" and hasattr(value, "__dict__"):
        if id(value) not in configs:
            configs[id(value)] = type(value), repr(vars(value))
        return configs[id(value)]
    return repr(value) if isinstance(value, int | float | str | tuple | None) else Identity(id(value))


def unknown_attribute(module: nn.Module, known: Iterable[object]) -> str | None:
    """Return the name of an attribute that the forward may depend on and is none of the `known` values, or None."""
    values = list(known)
    for name, value in module.__dict__.items():
        if (
            name in _OF_EVERY_MODULE
            or name in _HARMLESS
            or any(value is v or (type(value) is type(v) and value == v) for v in values)
        ):
            continue
        return name
    return None


def twin(module: nn.Module, parameters: Mapping[str, nn.Parameter], children: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a module's class and attributes, with other parameters and children, in train mode and without hooks."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(nn.Module().__dict__ | {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE})
    copy.__dict__.update(_parameters=OrderedDict(parameters), _modules=OrderedDict(children), training=True)
    return copy


def mismatch(
    module: nn.Module, fused: Run, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, of_gradients: float
) -> str | None:
    """Say how `fused` differs from what the module (a twin) computes; None if it does not.

    `tolerance` (of values), `of_gradients`: the largest relative norm of the difference; 0: bits must be equal.
    """
    module.training = MODES[-1]  # as after the last run, for `_state`
    before = _state(module)
    generator = torch.Generator().manual_seed(0)

    def own(x: Tensor) -> Tensor:
        return type(module).forward(module, x)

    with torch.enable_grad(), torch.device("cpu"):
        for training, size in itertools.product(MODES, SIZES):
            module.training = training
            x = (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            weights = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            try:
                theirs = _value_and_gradient(own, x, weights)
            except Exception as error:  # the class's own code, on inputs of our choice: anything may be raised
                return f"its forward fails on a probe ({type(error).__name__})"
            ours = _value_and_gradient(fused, x, weights)
            for quantity, a, b, allowed in zip(
                ("values", "gradients"), ours, theirs, (tolerance, of_gradients), strict=True
            ):
                if not _close(a, b, allowed):
                    return f"its {quantity} differ at inputs of size {size:g}"
    return None if _state(module) == before else "its forward changes the module"


def _value_and_gradient(run: Run, x: Tensor, weights: Tensor) -> tuple[Any, Any]:
    x = x.clone().requires_grad_()
    y = run(x)
    if not isinstance(y, Tensor) or y.shape != weights.shape or not y.requires_grad:
        return None, None
    (gradient,) = torch.autograd.grad((y * weights.to(y.dtype)).sum(), x)
    return y.detach(), gradient


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if a is None or b is None or a.dtype != b.dtype:
        return False
    if not tolerance:
        return torch.equal(a, b)
    difference = float((a - b).double().norm())
    return difference <= tolerance * float(b.double().norm())


def _state(module: nn.Module) -> dict[str, int]:
    """Return the identity of every attribute, and the version of every tensor, to detect changes."""
    return {name: id(value) for name, value in module.__dict__.items()} | {
        f"{name} {i}": p._version
        for name in ("_parameters", "_buffers")
        for i, p in enumerate(module.__dict__[name].values())
    }
