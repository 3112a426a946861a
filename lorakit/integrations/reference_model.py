"""A second model with the same parameters: the base without its adapters, as a reference for preference and
reinforcement learning.

    model       q_proj: LoraLinear     weight ─┐      + lora_default (A, B)
    reference   q_proj: nn.Linear      weight ─┴─ one tensor

Every module is a new object of its own class that shares parameters, buffers and settings with the model's. So the
reference costs no memory, equals the base bit for bit whatever is attached, active or trained later, and is an ordinary
model to a trainer, which may wrap or patch it. With `active`, frozen adapters are part of it.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..bases.pipeline import PipelineModel, as_module
from ..errors import StateError
from ..layers import fastpath, fused_qkv
from ..layers.expert_weight import ExpertWeight
from ..layers.layer import COUNT, LoraLayer, Own, Swapped, child_name, mixin_and_base, rebind_hooked_forward
from ..layers.saved import put, saved_of
from ..model import save_plain, save_pretrained
from ..model.activate import weight_at, weights_of
from ..model.sharded import how_sharded
from ..model.state import STATE, State, Weights, check_not_routed, names_of, state_of

Model = TypeVar("Model", bound=nn.Module)
_SAVE = "save_pretrained"


def reference(model: Model, active: str | Mapping[str, Weights] | None = None) -> Model:
    """Return the base of a model with adapters as a model of its own, in evaluation mode, with the same parameters.

    active: frozen adapters that are part of it, as `lorakit.activate` takes them: a name, or names with weights; None:
    the base alone. It does not change when the model is trained, or other adapters are attached, activated or detached;
    it does when weights of the base are replaced or written to, as by `lorakit.merge`.

    Raises StateError if the model has no adapter attached, for an unknown adapter or one that is trained, while one is
    merged, inside `route`, for a diffusers pipeline, and if parameters are sharded over processes.
    """
    if isinstance(as_module(model), PipelineModel):
        raise StateError("reference(model): got a diffusers pipeline\n  give one of its models, such as pipe.unet")
    state = state_of(model)
    check_not_routed(state, "reference")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base, so there is no base to refer to\n"
            "  call lorakit.unmerge(model) first"
        )
    how = how_sharded(model)
    if how is not None:
        raise StateError(f"{how}: a reference needs all of the model\n  make it before the model is sharded")
    weights = weights_of(state, active, "reference(model, active)")
    trained = [name for name in weights if state.adapters[name].trainable]
    if trained:
        raise StateError(
            f"adapter '{trained[0]}' is trained, so a reference with it would change with every step\n"
            "  attach a frozen copy, and name that: "
            f"lorakit.attach(model, lorakit.capture(model, '{trained[0]}'), 'reference', activate=False)"
        )
    view: Model = _View(model, state, weights).build()
    return view


class _View:
    """Builds the reference. `copies`: of each of the model's modules that it has, by the module's id."""

    def __init__(self, model: nn.Module, state: State, weights: Mapping[str, Weights]):
        self.model, self.weights = model, weights
        self.children = {child_name(name): weight for name, weight in weights.items()}
        self.with_saved = [name for name in weights if state.adapters[name].saved]
        self.copies: dict[int, nn.Module] = {}

    def build(self) -> Any:
        view = self._copy(self.model, "")
        for copy in self.copies.values():
            for name, value in copy.__dict__.items():
                copy.__dict__[name] = self._own(value)
            self._bind_forward(copy)
        fastpath.reopen(view)
        fused_qkv.unwatch(view)
        if self.weights:
            view.__dict__[_SAVE] = _refuse_saving
        return view

    def _copy(self, module: nn.Module, name: str) -> nn.Module:
        """Copy a module and its children, which still have the original's attributes. `name`: in the model."""
        known = self.copies.get(id(module))
        if known is not None:
            return known
        adapted = isinstance(module, Swapped) and self._is_adapted(module)
        cls = mixin_and_base(type(module))[1] if isinstance(module, Swapped) and not adapted else type(module)
        copy = self.copies[id(module)] = cls.__new__(cls)
        for key, value in module.__dict__.items():
            if not _is_ours(key, value, adapted):
                copy.__dict__[key] = value.copy() if type(value) in (dict, OrderedDict, list, set) else value
        copy.__dict__["training"] = False
        copy.__dict__["_compiled_call_impl"] = None  # would call the original
        self._put_saved(module, copy)
        if isinstance(copy, LoraLayer):
            held = ((child, w) for child, w in self.children.items() if child in module._modules)
            own = copy.lora_name or name
            copy.lora_active = tuple((child, weight_at(w, own)) for child, w in held)
            copy.__dict__[COUNT] = len(copy.lora_active)
        copy.__dict__["_modules"] = {
            last: child if child is None else self._copy(child, self._name(name, last, child))
            for last, child in module._modules.items()
            if self._keeps(module, last, child)
        }
        return copy

    @staticmethod
    def _name(parent: str, last: str, child: nn.Module) -> str:
        own = child.parameter if isinstance(child, ExpertWeight) else last
        return f"{parent}.{own}" if parent else own

    def _is_adapted(self, module: nn.Module) -> bool:
        """Whether an adapter of the reference changes this module, or a weight of these experts."""
        return any(
            self._is_adapted(child) if isinstance(child, ExpertWeight) else name in self.children
            for name, child in module._modules.items()
            if isinstance(child, Own)
        )

    def _keeps(self, module: nn.Module, name: str, child: nn.Module | None) -> bool:
        """Whether a child is part of the reference: all of the base's, and those of its adapters."""
        if isinstance(child, ExpertWeight):
            return self._is_adapted(child)
        inside_update = isinstance(module, Own) and not isinstance(module, ExpertWeight)
        return inside_update or not isinstance(child, Own) or name in self.children

    def _put_saved(self, module: nn.Module, copy: nn.Module) -> None:
        """Give the copy the base's own parameters, or those of its adapters, where an adapter replaces some."""
        child = saved_of(module)
        if child is None:
            return
        put(copy, child, self.with_saved)
        for handle in child.hooks:  # they look for the child, which the copy has not
            copy._state_dict_hooks.pop(handle.id, None)
            copy._load_state_dict_pre_hooks.pop(handle.id, None)

    def _own(self, value: Any) -> Any:
        """Return an attribute's value with the copy of each module that it refers to."""
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._own(each) for each in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._own(each)) for key, each in value.items())
        if isinstance(value, types.MethodType) and id(value.__self__) in self.copies:
            return types.MethodType(value.__func__, self.copies[id(value.__self__)])
        if isinstance(value, functools.partial):
            return functools.partial(value.func, *map(self._own, value.args), **value.keywords)
        return value

    def _bind_forward(self, copy: nn.Module) -> None:
        """Drop a forward of the instance that calls the original.

        Trainers and accelerate put functions there that keep the original's forward in their closure (TRL's fused
        output layer, autocast). Hooks of accelerate call `_old_forward`, and stay.
        """
        forward = copy.__dict__.get("forward")
        if isinstance(forward, functools.partial) and "_old_forward" in copy.__dict__:
            rebind_hooked_forward(copy)
            functools.update_wrapper(forward, copy.__dict__["_old_forward"])
        elif forward is not None and not _is_self_contained(forward):
            del copy.__dict__["forward"]


def _is_self_contained(forward: Any) -> bool:
    """Whether a function, or a bound method's, has no closure in which the original could be."""
    function = getattr(forward, "__func__", forward)
    return isinstance(function, types.FunctionType) and function.__closure__ is None


def _is_ours(key: str, value: Any, adapted: bool) -> bool:
    """Whether lorakit put this attribute on the module, and the reference does without."""
    if key == STATE or isinstance(value, save_pretrained.SavePretrained | save_plain.SavePlain):
        return True
    return key == "lora_route" or (not adapted and (key == COUNT or key.startswith("lora_")))


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise StateError(
        "save_pretrained of a reference with adapters would write the base's weights and theirs under lorakit's names\n"
        "  save the adapter: lorakit.capture(model, NAME).save(PATH)"
    )
