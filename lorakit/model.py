"""An adapter meets a live model: attach, capture, activate, merge, unmerge, detach, summary.

Every function takes the model first and changes it in place. What a model carries is written in one place, `_State`, kept
on the model itself: there is no global state and no wrapper.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapter.adapter import Adapter
from .adapter.factors import Factors
from .adapter.fingerprint import differences, fingerprint
from .config import LoraConfig
from .errors import AdapterError, StateError, TargetError, did_you_mean, listing
from .layers import fastpath, saved
from .layers.layer import LoraFactors, LoraLayer, child_name
from .layers.merge import merge_module, unmerge_module
from .layers.place import factors_for, fresh_for
from .layers.swap import adopt, mixin_and_base, release
from .layers.targets import check_adaptable, check_packed, find_saved, find_targets, module_names, shortest_endings, with_head

_STATE = "_lorakit"
DEFAULT = "default"


@dataclass
class _Attached:
    """One adapter on a model."""

    config: LoraConfig  # with `targets` resolved to this model's names
    modules: list[str]
    saved: list[str]
    trainable: bool
    metadata: Mapping[str, Any]
    skipped: Mapping[str, str]


@dataclass
class _State:
    adapters: dict[str, _Attached] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    merged: dict[str, float] | None = None
    required_grad: set[str] = field(default_factory=set)  # the base's parameters that took gradients before


def attach(
    model: nn.Module,
    adapter: LoraConfig | Adapter,
    name: str = DEFAULT,
    trainable: bool | None = None,
    *,
    strict: bool = True,
    force: bool = False,
) -> nn.Module:
    """Put an adapter on the model, in place, and make it the active one. Returns the model.

    A config gives a fresh adapter (ΔW = 0), trainable, and freezes the base; an `Adapter` comes with its factors and is not
    trainable, unless said. `strict=False` lets an adapter's factors that fit no module pass (`summary` lists them);
    `force=True` attaches although the base differs from the one the adapter was trained on.
    Raises TargetError, AdapterError or StateError, and then leaves the model as it was.
    """
    state = _state(model, create=False) or _State()
    _check_new_name(state, name)
    if state.merged is not None:
        raise StateError(f"cannot attach '{name}' while {_names(state.merged)} is merged\n  lorakit.unmerge(model) first")
    if trainable is None:
        trainable = isinstance(adapter, LoraConfig)
    config, metadata = (with_head(model, adapter), {}) if isinstance(adapter, LoraConfig) else (adapter.config, adapter.metadata)
    if isinstance(adapter, LoraConfig):
        targets = find_targets(model, config)
        modules, skipped = targets.modules, targets.skipped
        values = _fresh_saved(model, config, modules)
        metadata = {"fingerprint": fingerprint(dict(base_parameters(model)), _architecture(model))}
    else:
        adapter.check()
        _check_base(model, adapter, force)
        modules, skipped = _modules_of(model, adapter, strict)
        values = {n: adapter.saved[n] for n in _saved_of(model, adapter, strict, skipped)}
    swapped = [module for module in modules.values() if not isinstance(module, LoraLayer)]
    try:
        for m, module in modules.items():
            adopt(module, config.parts_of(m) if isinstance(adapter, LoraConfig) else adapter.factors[m].parts)
        if isinstance(adapter, LoraConfig):
            built = {m: fresh_for(module, m, config, trainable) for m, module in modules.items()}
        else:
            built = {m: factors_for(module, m, adapter.factors[m], config.dropout, trainable) for m, module in modules.items()}
        for full in values:
            module = model.get_submodule(full.rpartition(".")[0])
            if "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values()):
                raise StateError(f"'{full}' is offloaded, so a copy cannot be trained in its place\n  keep this module in memory")
        for m, module in modules.items():
            if hasattr(module, child_name(name)):
                raise StateError(f"'{m}' ({type(module).__name__}) has an attribute '{child_name(name)}' of its own\n  choose another name")
    except Exception:
        for module in swapped:
            release(module)
        raise
    # From here on nothing can fail.
    every = list(module_names(model))
    if not state.adapters:
        state.required_grad = {n for n, p in base_parameters(model) if p.requires_grad}
    if trainable and not any(a.trainable for a in state.adapters.values()):
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
    for m, module in modules.items():
        module.add_module(child_name(name), built[m].train(module.training))
    saved.use(model, None)
    copies: list[tuple[Tensor, Tensor, nn.Parameter]] = []
    for full, value in values.items():
        module_name, _, last = full.rpartition(".")
        module = model.get_submodule(module_name)
        own = module._parameters[last]
        assert own is not None
        # Names that share the base's weight and get the same value share the copy too: tied weights stay tied.
        kept = next((p for o, v, p in copies if o is own and (v is value or torch.equal(v, value))), None)
        if kept is None:
            # In the base's precision: the module is called as it is, with activations of that precision.
            kept = nn.Parameter(value.detach().to(own.device, own.dtype, copy=True), requires_grad=trainable)
            copies.append((own, value, kept))
        saved.keep(name, module, last, kept)
    fastpath.close(model)
    if modules:
        config = config.replace(targets=shortest_endings(list(modules), every), exclude=None, layers=None)
    state.adapters[name] = _Attached(config, list(modules), list(values), trainable, metadata, skipped)
    model.__dict__[_STATE] = state
    _activate(model, state, {name: 1.0})
    return model


def capture(model: nn.Module, name: str | None = None) -> Adapter:
    """An attached adapter as a value: copies of its factors and saved weights, on the CPU. `name`: may be left out if it is the only one."""
    state = _state(model)
    attached = _attached(state, name)
    name = name or next(iter(state.adapters))
    factors = {}
    for m in attached.modules:
        layer = _layer(model, m)
        child: LoraFactors = layer._modules[child_name(name)]  # type: ignore[attr-defined]
        A, B = layer.lora_full(child)
        parts = getattr(layer, "lora_parts", None) if child.B.dim() == 3 and child.A.dim() == 2 else None
        factors[m] = Factors(
            _copy(A), _copy(B), child.alpha, layer.lora_kind, child.rslora, layer.lora_transposed and layer.lora_kind == "linear",  # type: ignore[arg-type]
            groups=getattr(layer, "groups", 1) if layer.lora_kind == "conv" else 1, parts=parts,
        )  # fmt: skip
    kept = {}
    for full in attached.saved:
        module_name, _, last = full.rpartition(".")
        child_saved = saved.saved_of(model.get_submodule(module_name))
        assert child_saved is not None
        kept[full] = _copy(child_saved.get(name)[last])
    return Adapter(attached.config, factors, kept, copy.deepcopy(dict(attached.metadata)))


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Choose what the model computes with: one adapter, several with weights (their updates are summed), or None, the base alone."""
    state = _state(model)
    wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        _attached(state, name)
        if not torch.isfinite(torch.tensor(float(weight))):
            raise StateError(f"the weight of adapter '{name}' is {weight}; expected a finite number")
    if state.merged is not None:
        raise StateError(f"{_names(state.merged)} is merged into the base; lorakit.unmerge(model) before activating another")
    holding = [n for n in wanted if state.adapters[n].saved]
    if len(holding) > 1 or (holding and wanted[holding[0]] != 1.0):
        raise StateError(
            f"adapter '{holding[0]}' replaces whole weights ({listing(state.adapters[holding[0]].saved, 3)}), which cannot be mixed or scaled\n"
            "  activate it alone or beside adapters without saved weights, with weight 1"
        )
    _activate(model, state, wanted)


def active(model: nn.Module) -> dict[str, float]:
    """The active adapters and their weights; empty for the base alone."""
    return dict(_state(model).active)


def adapters(model: nn.Module) -> list[str]:
    """The names of the attached adapters."""
    state = _state(model, create=False)
    return list(state.adapters) if state else []


def merge(model: nn.Module) -> None:
    """Add the active adapters' ΔW into the base's weights. `unmerge` gives every bit back.

    It keeps what that needs, a quarter to one byte a merged weight. Raises StateError if something is merged already,
    and where merging would be wrong: a tied weight of which only one user is adapted, quantized or offloaded weights.
    """
    state = _state(model)
    if state.merged is not None:
        raise StateError(f"{_names(state.merged)} is merged already\n  lorakit.unmerge(model) first")
    if not state.active:
        raise StateError("no adapter is active, so there is nothing to merge\n  lorakit.activate(model, name) first")
    layers = {m: layer for m, layer in _layers(model) if layer.lora_in_use()}
    _check_tied(model, layers)
    done: list[LoraLayer] = []
    try:
        for m, layer in layers.items():
            merge_module(layer, m)
            done.append(layer)
    except Exception:
        for layer in done:
            unmerge_module(layer, "a module")
        raise
    state.merged = dict(state.active)


def unmerge(model: nn.Module) -> None:
    """Take the merged ΔW out of the base's weights, which then have their original bits."""
    state = _state(model)
    if state.merged is None:
        raise StateError("nothing is merged into this model")
    for m, layer in _layers(model):
        if layer.lora_merged is not None:
            unmerge_module(layer, m)
    state.merged = None


def detach(model: nn.Module, name: str | None = None, merged: Literal["keep", "undo"] | None = None) -> nn.Module:
    """Remove all adapters (or one): classes, names, gradients' flags and bits are then as if lorakit had never been here.

    While something is merged, `merged` must say what becomes of it: "keep" leaves ΔW (and saved weights) in the base, a
    plain merged model; "undo" restores the base first.
    """
    state = _state(model)
    if state.merged is not None:
        if merged is None:
            raise StateError(
                f"{_names(state.merged)} is merged: say detach(model, merged='keep') for a plain merged model, or merged='undo' for the base"
            )
        if merged == "undo":
            unmerge(model)
        elif name is not None:
            raise StateError("merged='keep' removes all adapters; leave `name` out")
    keep = state.active if merged == "keep" and state.merged is not None else {}
    gone = list(state.adapters) if name is None else [name]
    for n in gone:
        _attached(state, n)
    for n in gone:
        _remove(model, state, n, keep_saved=n in keep)
    if not state.adapters:
        del model.__dict__[_STATE]
        for full, parameter in model.named_parameters():
            parameter.requires_grad_(full in state.required_grad)
    else:
        _activate(model, state, {n: w for n, w in state.active.items() if n in state.adapters})
    fastpath.reopen(model)
    return model


@dataclass(frozen=True)
class Summary:
    """What is attached. Print it."""

    trainable: int
    total: int
    rows: list[tuple[str, str, str, int, int]]  # adapter, module, shape, rank, parameters
    active: dict[str, float]
    skipped: dict[str, str]

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0
        lines = [
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.3g} %); active: {_names(self.active) if self.active else 'the base alone'}"
        ]
        groups: dict[tuple[str, str, str, int], list[int]] = {}
        for adapter, module, shape, rank, count in self.rows:
            groups.setdefault((adapter, module.rsplit(".", 1)[-1], shape, rank), []).append(count)
        width = max((len(k[1]) for k in groups), default=0)
        for (adapter, last, shape, rank), counts in groups.items():
            lines.append(f"  {adapter}: {last:<{width}}  {len(counts):>4} x {shape:<14} rank {rank:<4} {sum(counts):>12,}")
        lines += [f"  left out: {module} ({why})" for module, why in self.skipped.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Trainable and total parameters, and each adapter's share per target."""
    state = _state(model)
    rows, skipped = [], {}
    for name, attached in state.adapters.items():
        skipped.update(attached.skipped)
        for m in attached.modules:
            layer = _layer(model, m)
            child: LoraFactors = layer._modules[child_name(name)]  # type: ignore[attr-defined]
            shape = "x".join(str(s) for s in getattr(layer, "weight", torch.empty(0)).shape)
            rows.append((name, m, shape, child.rank, child.A.numel() + child.B.numel()))
    every = {id(p): p for p in model.parameters()}.values()
    return Summary(sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every), rows, dict(state.active), skipped)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters by their own names, whatever is attached or active."""
    for module_name, module in model.named_modules():
        if isinstance(module, LoraFactors | saved.SavedParameters) or ".lora_saved" in f".{module_name}":
            continue
        child = saved.saved_of(module)
        own = child.get(saved.BASE) if child else {}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{module_name}.{name}" if module_name else name, own.get(name, parameter)


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key is lorakit's, not the base's."""
    return any(part.startswith("lora_") for part in key.split("."))


# ------------------------------------------------------------------------------------------ inside


def _state(model: nn.Module, create: bool = True) -> Any:
    state = model.__dict__.get(_STATE)
    if state is None and create:
        raise StateError(
            f"no adapter is attached to this {type(model).__name__}\n  lorakit.attach(model, ...) first, and pass the same object it was given"
        )
    return state


def _attached(state: _State, name: str | None) -> _Attached:
    if name is None:
        if len(state.adapters) != 1:
            raise StateError(f"{len(state.adapters)} adapters are attached: {listing(state.adapters)}; say which")
        return next(iter(state.adapters.values()))
    if name not in state.adapters:
        raise StateError(
            f"no adapter named '{name}' is attached{did_you_mean(name, state.adapters)}\n  attached: {listing(state.adapters)}"
        )
    return state.adapters[name]


def _check_new_name(state: _State, name: str) -> None:
    if not name:
        raise StateError("'' cannot be an adapter's name")
    twin = next((n for n in state.adapters if n != name and child_name(n) == child_name(name)), None)
    if twin is not None:
        raise StateError(f"the names '{name}' and '{twin}' would be one child of each module\n  choose another name")
    if name in state.adapters:
        raise StateError(f"an adapter named '{name}' is attached already\n  choose another name, or lorakit.detach(model, '{name}') first")


def _activate(model: nn.Module, state: _State, wanted: dict[str, float]) -> None:
    state.active = wanted
    for _, layer in _layers(model):
        layer.lora_active = tuple((child_name(n), w) for n, w in wanted.items() if child_name(n) in layer._modules)  # type: ignore[attr-defined]
    saved.use(model, next((n for n in wanted if state.adapters[n].saved), None))


def _remove(model: nn.Module, state: _State, name: str, keep_saved: bool) -> None:
    attached = state.adapters.pop(name)
    for m in attached.modules:
        module = model.get_submodule(m)
        del module._modules[child_name(name)]
        if not any(isinstance(c, LoraFactors) for c in module.children()):
            release(module)
    if attached.saved:
        if keep_saved:
            saved.adopt_as_base(model, name)
        saved.forget(model, name)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _layer(model: nn.Module, name: str) -> LoraLayer:
    return model.get_submodule(name)  # type: ignore[return-value]


def _modules_of(model: nn.Module, adapter: Adapter, strict: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that the adapter's factors name, and those it names in vain."""
    names = module_names(model)
    found = {m: names[m] for m in adapter.factors if m in names}
    lost = [m for m in adapter.factors if m not in names]
    if lost and (strict or not found):
        raise TargetError(
            f"{len(lost)} of the adapter's {len(adapter.factors)} modules are not in this {type(model).__name__}: {listing(lost, 3)}{did_you_mean(lost[0], names)}\n"
            "  is it an adapter for another model? strict=False attaches the rest and lists these"
        )
    check_adaptable(names, found)
    first: dict[int, str] = {}
    for m, module in found.items():
        parts = adapter.factors[m].parts
        if parts is not None:
            check_packed(m, module, len(parts))
        if first.setdefault(id(module), m) != m:
            raise TargetError(f"the adapter holds factors for '{first[id(module)]}' and '{m}', which are one module in this model")
    return found, dict.fromkeys(lost, "no such module in this model")


def _saved_of(model: nn.Module, adapter: Adapter, strict: bool, skipped: dict[str, str]) -> list[str]:
    own = dict(model.named_parameters(remove_duplicate=False))
    lost = [n for n in adapter.saved if n not in own]
    buffers = [n for n in lost if n in dict(model.named_buffers())]
    if buffers and strict:
        raise TargetError(
            f"the adapter holds running values of the base ({listing(buffers, 3)}), which lorakit cannot switch\n"
            "  strict=False attaches the rest and leaves these as the base has them"
        )
    if lost and strict:
        raise TargetError(
            f"{len(lost)} weights that the adapter saved whole are not in this {type(model).__name__}: {listing(lost, 3)}{did_you_mean(lost[0], own)}"
        )
    skipped |= dict.fromkeys(lost, "no such parameter in this model")
    for n, value in adapter.saved.items():
        if n in own and own[n].shape != value.shape:
            raise AdapterError(f"saved weight '{n}' has shape {list(value.shape)}; the model's has {list(own[n].shape)}")
    return [n for n in adapter.saved if n in own]


def _fresh_saved(model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters that a fresh adapter trains whole, with their starting values: save_modules, and biases as asked."""
    values: dict[str, Tensor] = {}
    for name, module in find_saved(model, config).items():
        own = {f"{name}.{n}": p for n, p in base_parameters(module)}
        if not own:
            raise TargetError(f"'{name}' has no parameters to train (LoraConfig.save_modules)")
        running = [n for n, _ in module.named_buffers() if n in module.state_dict() and not is_adapter_key(n)]
        if running:
            raise TargetError(
                f"'{name}' also keeps running values ({listing(running, 3)}), which an adapter cannot hold (LoraConfig.save_modules)\n"
                "  name the modules inside or beside it that have none"
            )
        values |= own
    if config.bias == "lora_only":
        values |= {f"{m}.bias": p for m, module in targets.items() for n, p in base_parameters(module) if n == "bias"}
    elif config.bias == "all":
        values |= {n: p for n, p in base_parameters(model) if n == "bias" or n.endswith(".bias")}
    # A weight that several modules share (tied embeddings) is trained for all of them.
    shared = {id(p) for p in values.values()}
    return values | {n: p for n, p in base_parameters(model) if id(p) in shared}


def _check_base(model: nn.Module, adapter: Adapter, force: bool) -> None:
    expected = adapter.metadata.get("fingerprint")
    if expected and not force:
        lines = differences(expected, dict(base_parameters(model)), _architecture(model))
        if lines:
            raise AdapterError(
                "the adapter was trained on another base:\n  "
                + "\n  ".join(lines)
                + "\n  load that base, or attach(..., force=True) if you know better"
            )


def _check_tied(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """A weight used by two modules, of which one is adapted, cannot hold ΔW for that one alone."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, LoraFactors):
            users.setdefault(id(weight), []).append(name)
    for m, layer in layers.items():
        others = [n for n in users.get(id(layer.weight), []) if n != m]  # type: ignore[attr-defined]
        if others:
            raise StateError(
                f"'{m}' shares its weight with {listing(others)} (tied weights), so merging would change both\n"
                "  keep the adapter unmerged, or give the module a weight of its own first:\n"
                f"  module.weight = torch.nn.Parameter(module.weight.detach().clone()), and config.tie_word_embeddings = False"
            )


def _architecture(model: nn.Module) -> str:
    cls = type(model)
    return mixin_and_base(cls)[1].__name__ if isinstance(model, LoraLayer) else cls.__name__


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _names(chosen: Mapping[str, float]) -> str:
    return " + ".join(f"'{n}'" if w == 1 else f"{w:g} x '{n}'" for n, w in chosen.items())
