"""`save_pretrained` of a diffusers model, and of a pipeline with all its components, with adapters attached.

A merged one is saved as the plain model that it is. Otherwise it is an error before anything is written: diffusers
would put the adapter's tensors into the base's file, and has no place for an adapter beside it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..bases.pipeline import PipelineModel
from ..errors import StateError
from ..layers.layer import LoraLayer
from ..layers.saved import BASE, saved_of
from ..layers.walk import base_modules
from .state import is_adapter_key

NAME = "save_pretrained"


def adopt(model: nn.Module) -> None:
    """Give a diffusers model, or a pipeline and its components, this `save_pretrained`, on the instance."""
    for owner in _savers(model):
        if hasattr(type(owner), NAME) and NAME not in owner.__dict__:
            owner.__dict__[NAME] = SavePlain(owner)


def release(model: nn.Module) -> None:
    """Give each its class's own `save_pretrained` back."""
    for owner in _savers(model):
        if isinstance(owner.__dict__.get(NAME), SavePlain):
            del owner.__dict__[NAME]


def _savers(model: nn.Module) -> Iterator[Any]:
    if isinstance(model, PipelineModel):
        yield model.pipe
        yield from model.components.values()
    else:
        yield model


class SavePlain:
    """The owner's own `save_pretrained`, for a model or pipeline whose adapters are merged. It does not keep the owner
    alive.
    """

    def __init__(self, owner: Any):
        self._owner = weakref.ref(owner)
        self._of_merged_pipeline = False

    def __reduce__(self) -> Any:
        return SavePlain, (self._owner(),)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self._owner()), NAME).__get__(self._owner()))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save it. Raises StateError if it has adapters, and none is merged."""
        owner = self._owner()
        own = getattr(type(owner), NAME)
        models = [owner] if isinstance(owner, nn.Module) else _models(owner)
        layers = [m for model in models for _, m in base_modules(model) if isinstance(m, LoraLayer)]
        if all(layer.lora_merged is None for layer in layers) and not self._of_merged_pipeline:
            raise StateError(
                f"save_pretrained of a {type(owner).__name__} with adapters attached: diffusers has no place for them "
                "beside the base\n"
                "  save the adapter: lorakit.capture(pipe).save(PATH, format='diffusers'); the model with it: "
                "lorakit.merge(pipe) first; the base alone: lorakit.detach(pipe) first"
            )
        with ExitStack() as stack:
            if isinstance(owner, nn.Module):
                stack.callback(owner.register_state_dict_post_hook(_as_merged).remove)
            else:
                for saver in (model.__dict__.get(NAME) for model in models):
                    if isinstance(saver, SavePlain):
                        saver._of_merged_pipeline = True
                        stack.callback(setattr, saver, "_of_merged_pipeline", False)
            return own(owner, *args, **options)


def _models(pipe: Any) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]


def _as_merged(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave the adapters' tensors out of a state dict; weights that a merged one replaces have the base's names."""
    for key in [key for key in state if key.startswith(prefix) and is_adapter_key(key.removeprefix(prefix))]:
        del state[key]
    for name, module in base_modules(model):
        child = saved_of(module)
        if child is not None:
            front = f"{prefix}{name}." if name else prefix
            in_use = dict(module.named_parameters(recurse=False))
            state |= {front + own: in_use[own].detach() for own in child.get(BASE)}
