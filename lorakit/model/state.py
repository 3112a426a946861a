"""The state kept on a model: its adapters, which of them are active, and what is merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapter.fingerprint import Weight
from ..bases.pipeline import PipelineModel, component_of
from ..config import LoraConfig
from ..errors import StateError, did_you_mean, listing
from ..layers import fused_qkv, saved
from ..layers.bases import base_of, bias_of, fingerprinted, quantized
from ..layers.batched.routes import Routes, Routing
from ..layers.expert_weight import adapted_weight
from ..layers.fused import attention
from ..layers.layer import LoraLayer, child_name, mixin_and_base
from ..layers.walk import base_modules

STATE = "_lorakit"
Weights = float | Mapping[str, float]  # of an adapter; by the beginning of module names, such as a component or a block


@dataclass
class Attached:
    """One attached adapter. `modules` and `saved`: full names; `skipped`: module or parameter name -> reason."""

    config: LoraConfig  # `targets` resolved to this model's names
    modules: list[str]
    saved: list[str]
    trainable: bool
    metadata: Mapping[str, Any]
    skipped: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)  # the adapter's own, where this model has others
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)  # textual inversion: token -> vectors [n, dim]


@dataclass
class Untied:
    """What `merge(untie=True)` changed: shared weights, by the module that got a copy, and configs that said tied."""

    weights: dict[str, nn.Parameter]
    configs: list[Any]


@dataclass
class Vocabulary:
    """A text encoder's tokenizer and token embedding [tokens, dim] as they were before embeddings were attached."""

    tokenizer: Any
    weight: nn.Parameter
    added_to: nn.Parameter  # what stands in its place
    tokens: list[str]  # what was added


@dataclass
class State:
    """All that lorakit knows of a model, stored as its attribute `_lorakit`."""

    adapters: dict[str, Attached] = field(default_factory=dict)
    active: dict[str, Weights] = field(default_factory=dict)
    merged: dict[str, Weights] | None = None
    untied: Untied | None = None  # while merged
    required_grad: set[str] = field(default_factory=set)  # base parameters with requires_grad before the first attach
    routing: Routing | None = None  # set inside `route`
    routes: Routes | None = None  # cached by `route` between batches
    expected: int = 0  # how many adapters may be attached at once, see `route.expect`
    fixed: bool = False  # whether attached values never change, see `route.expect`
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)  # text encoders whose tokens were added to
    own_attention: bool = False  # transformers' attention is `layers.fused.attention`

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Register the attention again after unpickling, as it may be another process."""
        self.__dict__.update(fields)
        if self.own_attention:
            attention.register()


def state_of(model: nn.Module) -> State:
    """Return the model's state. Raises StateError if no adapter is attached."""
    state = model.__dict__.get(STATE)
    if state is None:
        raise StateError(
            f"no adapter is attached to this {architecture_of(model)}\n"
            "  call lorakit.attach(model, ...) first, and pass that same model or pipeline"
        )
    return state


def attached_of(state: State, name: str | None) -> Attached:
    """Return the adapter `name`, or the only one (None). Raises StateError if there is no such adapter, or several."""
    if name is None:
        if len(state.adapters) != 1:
            raise StateError(
                f"{len(state.adapters)} adapters are attached: {listing(state.adapters)}\n  give the name of one"
            )
        return next(iter(state.adapters.values()))
    if name not in state.adapters:
        raise StateError(
            f"no adapter named '{name}' is attached{did_you_mean(name, state.adapters)}\n"
            f"  attached: {listing(state.adapters)}"
        )
    return state.adapters[name]


def check_not_routed(state: State, function: str) -> None:
    """Raise StateError inside `route`. `function`: the one that was called, for the message."""
    if state.routing is not None:
        raise StateError(
            f"{function}(model, ...) inside `with lorakit.route(model, ...)`: each row has its own adapter there\n"
            "  call it outside the `with` block"
        )


def mark_in_use(model: nn.Module, state: State) -> None:
    """Tell a pipeline's model which of its components adapters change: these cannot be replaced."""
    if isinstance(model, PipelineModel):
        names = (component_of(n) for a in state.adapters.values() for n in (*a.modules, *a.saved))
        model.in_use = frozenset(name for name in (*names, *state.vocabularies) if name is not None)


def check_owner(model: nn.Module) -> None:
    """Raise StateError if adapters are attached to a part of the model by itself, or to more than this model."""
    for name, module in base_modules(model):
        if module is not model and STATE in module.__dict__:
            raise StateError(
                f"adapters are attached to '{name}' by itself, so they cannot be attached to the "
                f"{architecture_of(model)} that has it\n  detach them there first: lorakit.detach(...)"
            )
        if STATE not in model.__dict__ and isinstance(module, LoraLayer):
            raise StateError(
                f"'{name}' of this {architecture_of(model)} has adapters, which were attached to another model or "
                "pipeline that has it too\n"
                "  give that one, or detach them there first: lorakit.detach(...)"
            )


def check_new_name(state: State, name: str) -> None:
    """Raise StateError if an adapter cannot be attached under this name."""
    if not name:
        raise StateError("an adapter's name cannot be empty\n  expected something like 'sql'")
    child = child_name(name)
    twin = next((n for n in state.adapters if n != name and child_name(n) == child), None)
    if twin is not None:
        raise StateError(
            f"the names '{name}' and '{twin}' would both be the child '{child}' of each module\n  choose another name"
        )
    if name in state.adapters:
        raise StateError(
            f"an adapter named '{name}' is attached already\n"
            f"  choose another name, or call lorakit.detach(model, '{name}') first"
        )


def layers_of(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted modules with their full names."""
    for name, module in base_modules(model):
        if isinstance(module, LoraLayer):
            yield name, module


def layer_at(model: nn.Module, name: str) -> LoraLayer:
    """Return the adapted module with this full name."""
    layer = adapted_weight(model, name) or model.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    return layer


def saved_parameters(model: nn.Module, state: State, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that an adapter holds in full, with the names of the base's own."""
    for full in state.adapters[name].saved:
        module, _, last = full.rpartition(".")
        child = saved.saved_of(model.get_submodule(module))
        assert child is not None
        yield full, child.get(name)[last]


def base_parameters(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base's own parameters with their own names, whatever is attached or active.

    `every_name`: yield a tied parameter under all of its names rather than the first.
    """
    for module_name, module in base_modules(model, every_name):
        child = saved.saved_of(module)
        own = child.get(saved.BASE) if child else {}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{module_name}.{name}" if module_name else name, own.get(name, parameter)


def base_weights(model: nn.Module) -> dict[str, Weight]:
    """Return the base's weights for its fingerprint, by name. A quantized one has its shape before quantization."""
    copied = fused_qkv.copies(model)
    weights: dict[str, Weight] = {n: p for n, p in base_parameters(model) if n.rpartition(".")[0] not in copied}
    once: dict[int, Weight] = {}  # a shared weight stays one object
    for name, module in quantized(model).items():
        at, held = f"{name}." if name else "", base_of(module).stored(module)
        stored = [p for n in held if (p := weights.pop(at + n, None)) is not None]
        weights[f"{at}weight"] = once.setdefault(id(stored[0] if stored else module), fingerprinted(module))
        bias = bias_of(module)
        if bias is not None:
            weights.setdefault(f"{at}bias", bias)
    state = model.__dict__.get(STATE)
    before = {id(v.added_to): v.weight for v in state.vocabularies.values()} if state is not None else {}
    return {name: before.get(id(weight), weight) for name, weight in weights.items()} if before else weights


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key is lorakit's, not the base's."""
    return any(part.startswith("lora_") for part in key.split("."))


def architecture_of(model: nn.Module) -> str:
    """Return the name of the model's own class, or of the pipeline's."""
    cls = type(model.pipe) if isinstance(model, PipelineModel) else type(model)
    return mixin_and_base(cls)[1].__name__ if isinstance(model, LoraLayer) else cls.__name__


def names_of(weights: Mapping[str, Weights]) -> str:
    """Format adapters and their weights for messages: `'a' + 0.5 x 'b' + 'c' (0.7 x unet)`."""
    return " + ".join(
        f"'{n}' ({', '.join(f'{each:g} x {part}' for part, each in w.items())})"
        if isinstance(w, Mapping)
        else (f"'{n}'" if w == 1 else f"{w:g} x '{n}'")
        for n, w in weights.items()
    )


def qualified_name(value: object) -> str:
    """Return the name of a value's type, with its module, for error messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
