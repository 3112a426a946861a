"""Let bitsandbytes' int8 linears evaluate as they train.

    training, on a CPU or an Intel GPU      y = x Ŵᵀ with the dequantized Ŵ = index · absmax / 127
    evaluation, and everything on CUDA      x is quantized to int8 by rows too, but for its outliers: LLM.int8()

So on a CPU a run is evaluated on another function than it is trained on: 0.5 % of the logits differ on a small Llama.
`evaluate_as_trained` makes both the first, which is also what an adapter meets on the unquantized base. On CUDA both
are the second. PEFT and transformers leave the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

from torch import nn

_OURS = "_lora_evaluates_as_trained"  # marks a module whose state `release` restores


def evaluate_as_trained(model: nn.Module) -> None:
    """Let all int8 linears of bitsandbytes in the model compute in evaluation as in training, in place."""
    for module in model.modules():
        if _takes(module):
            _hold(module)


def hold(module: nn.Module) -> None:
    """Let one int8 linear compute so, until `release`."""
    if not _is_held(module.state):
        _hold(module)
        module.__dict__[_OURS] = True


def release(module: nn.Module) -> None:
    """Undo `hold`; a module that computed so before keeps it."""
    if module.__dict__.pop(_OURS, False):
        held: Any = module.state
        module.state = _as(type(held).__mro__[1], held.__dict__)


def _takes(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' linear in 8 bits. (By name: the library is not imported for this.)"""
    return any(c.__name__ == "Linear8bitLt" and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _hold(module: nn.Module) -> None:
    state: Any = module.state
    if not _is_held(state):
        cls: Any = type(state)
        module.state = _as(_held(cls), state.__dict__)


def _is_held(state: Any) -> bool:
    return isinstance(getattr(type(state), "is_training", None), property)


@functools.cache
def _held(cls: Hashable) -> type:
    """Return a subclass of bitsandbytes' state that is always in training, whatever its module sets."""

    def reduce(self: Any) -> tuple[Any, ...]:
        return _of, (cls, self.__dict__)

    # The module assigns its own mode before each forward.
    always = property(lambda self: True, lambda self, value: None)
    own: Any = cls
    # By its own name in messages and a repr; copies and pickles go through `_of`, which finds it by its base.
    return type(own.__name__, (own,), {"is_training": always, "__reduce__": reduce, "__slots__": ()})


def _of(cls: type, values: dict[str, Any]) -> Any:
    """Build a state that is always in training, for copies and pickles."""
    return _as(_held(cls), values)


def _as(cls: type, values: dict[str, Any]) -> Any:
    state: Any = object.__new__(cls)
    state.__dict__.update(values)
    return state
