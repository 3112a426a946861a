"""Resolve a config's target names to a model's modules, with an error for every name that matches nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..bases.pipeline import PipelineModel, component_of, is_text_encoder
from ..config import ALL_LINEAR, NONE, PRESETS, LoraConfig
from ..errors import TargetError, did_you_mean, listing, nearest
from ..module_names import ends_with, matches, pattern_matches
from . import attention_targets
from .bases import base_of
from .expert_targets import check_form, check_reachable, unadapted, with_expert_weights
from .expert_weight import ExpertWeight, expert_weights, why_not
from .fused_qkv import FIX, fused_away
from .layer import Swapped, mixin_and_base
from .presets import preset
from .swap import is_linear, mixin_for
from .unknown_linears import check_all_known, check_known
from .walk import base_modules
from .weight_reads import reads_of


@dataclass
class Targets:
    """`modules`: full name -> module, in the model's order; `skipped`: full name -> why it is not adapted, and targets
    that match no module (with `strict_targets=False`).
    """

    modules: dict[str, nn.Module]
    skipped: dict[str, str] = field(default_factory=dict)


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Map all module names to modules (one registered twice has two names), without lorakit's own children. Weights of
    experts are among them, under the names of these parameters.
    """
    names: dict[str, nn.Module] = {}
    weights: dict[int, list[ExpertWeight]] = {}
    for name, module in base_modules(model, every_name=True):
        if name and not isinstance(module, ExpertWeight):
            names[name] = module
        if id(module) not in weights:
            weights[id(module)] = list(expert_weights(module))
        names |= {f"{name}.{w.parameter}" if name else w.parameter: w for w in weights[id(module)]}
    return names


def layer_number(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The number that PEFT takes for a module's layer: 3 for `model.layers.3.self_attn.q_proj`.

    Without `patterns` the first that follows two names or more, and is followed by one (the 1 of `0.layers.1.q_proj`);
    with them the one after the first of these names that is found.
    """
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", name)
    else:
        matched = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", name) for pattern in patterns)
        found = next((match for match in matched if match is not None), None)
    return int(found["number"]) if found is not None else None


def _in_layers(chosen: dict[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    """The chosen modules that are in `config.layers`. Raises TargetError for a layer without any."""
    assert config.layers is not None
    numbers = {name: layer_number(name, config.layers_pattern) for name in chosen}
    if not config.layers_pattern and not any(number is not None for number in numbers.values()):
        # A stack that is itself the model, or its only child (`layers.0.q_proj`), has no two names in front. PEFT finds
        # no layer there at all.
        numbers = {name: next((int(p) for p in name.split(".") if p.isdigit()), None) for name in chosen}
    present = {number for number in numbers.values() if number is not None}
    missing = [number for number in config.layers if number not in present]
    if missing:
        hint = f" after {listing(config.layers_pattern, 3)}" if config.layers_pattern else ""
        raise TargetError(
            f"no target is in layer {missing[0]} (LoraConfig.layers)\n"
            f"  the targets are in layers {sorted(present) or 'without numbers'}{hint}"
        )
    return {name: module for name, module in chosen.items() if numbers[name] in config.layers}


def find_targets(model: nn.Module, config: LoraConfig) -> Targets:
    """Find the modules that `config` adapts.

    Raises TargetError for a name, pattern or layer that matches nothing, and for a module that cannot be adapted.
    """
    names = in_components(model, config)
    skipped: dict[str, str] = {}
    if config.targets == NONE:
        return Targets({})
    if config.targets in PRESETS:
        chosen, skipped = _by_preset(model, config, names)
    else:
        chosen = with_expert_weights(names, [name for name in names if matches(name, config.targets)])
        if config.strict_targets or not chosen:
            check_reachable(names, config.targets)
            _check_each_matches(
                list(names), config.targets, "targets", [n for n in module_names(model) if n not in names]
            )
        elif isinstance(config.targets, list):
            missed = [t for t in config.targets if not any(ends_with(name, t) for name in names)]
            skipped |= dict.fromkeys(missed, "no module matches this target")
    chosen = attention_targets.with_output(names, chosen)
    # A module that is trained in full needs no update (as in PEFT).
    skipped |= {name: "in save_modules" for name in chosen if _within(name, config.save_modules)}
    chosen = {name: module for name, module in chosen.items() if name not in skipped}
    if config.exclude is not None:
        _check_each_matches(list(names), config.exclude, "exclude")
        excluded = with_expert_weights(names, [name for name in names if matches(name, config.exclude)])
        chosen = {name: module for name, module in chosen.items() if name not in excluded}
    if config.layers is not None:
        chosen = _in_layers(chosen, config)
    if not chosen:
        raise TargetError(
            "nothing is left to adapt: LoraConfig.exclude, layers and save_modules exclude every target\n"
            "  give fewer of these, or more targets"
        )
    check_adaptable(names, chosen)
    check_form(chosen, config)
    chosen = _once_each(chosen)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(pattern_matches(key, name) for name in chosen):
                raise TargetError(
                    f"no adapted module matches '{key}' (LoraConfig.{field_name}){_suggestion(key, list(chosen))}"
                )
    for key, parts in config.packed.items():
        packed = [name for name in chosen if ends_with(name, key)]
        if not packed:
            raise TargetError(f"no adapted module matches '{key}' (LoraConfig.packed){_suggestion(key, list(chosen))}")
        for name in packed:
            check_packed(name, chosen[name], len(parts))
    return Targets(chosen, skipped)


def in_components(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Map all names to modules; of a pipeline, those in the components that the config adapts.

    Raises TargetError for a component that the pipeline lacks.
    """
    names, own = module_names(model), list(model.components) if isinstance(model, PipelineModel) else []
    if not own:
        if config.components is not None:
            raise TargetError(
                f"LoraConfig.components is {config.components}, and this {type(model).__name__} is no pipeline\n"
                "  attach to the pipeline, or leave components out"
            )
        return names
    chosen = config.components
    if chosen is None:
        if isinstance(config.targets, str) and config.targets not in PRESETS:
            return names  # a regular expression for full names, which begin with the component
        named = {component_of(entry) for entry in config.targets}
        chosen = [c for c in own if c in named or not is_text_encoder(c)]
    for component in chosen:
        if component not in own:
            raise TargetError(
                f"the pipeline has no '{component}' to adapt (LoraConfig.components){did_you_mean(component, own)}\n"
                f"  it has {listing(own)}"
            )
    return {name: module for name, module in names.items() if name.partition(".")[0] in chosen}


def _by_preset(
    model: nn.Module, config: LoraConfig, names: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the modules of a preset, and those among them that are not adapted, with the reason."""
    targets, experts = config.targets, {}
    assert isinstance(targets, str)
    roots = {*getattr(model, "components", ()), ""}
    if targets == ALL_LINEAR:
        check_all_known(names)
        of = [n for n, m in names.items() if is_linear(m) or isinstance(m, ExpertWeight)]
        experts = unadapted(names, config) | attention_targets.unadapted(names)
        of = [n for n in of if n not in experts]
    else:
        of = preset(targets, names, roots)
    if not of:
        what = "linear layer" if targets == ALL_LINEAR else "attention"
        raise TargetError(
            f"the model has no {what} to adapt (LoraConfig.targets='{targets}')\n  name the modules to adapt instead"
        )
    head, not_called = _output_head(model), called_by_weight(names) | _bypassed_in_training(names)
    skipped = {name: "the output head" if names[name] is head else not_called.get(name) for name in of}
    left_out = {n: why for n, why in skipped.items() if why is not None} | experts
    return {n: names[n] for n in of if skipped[n] is None}, left_out


def with_head(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return the config with the head in `save_modules` for classification and question answering, as in PEFT."""
    heads = {
        "IMAGE_CLASSIFICATION": ("classifier",),  # lorakit's: PEFT has no task_type for it, and names the head by hand
        "QUESTION_ANS": ("qa_outputs",),
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
    }
    if config.task not in heads:
        return config
    names = module_names(model)
    present = [h for h in heads[config.task] if any(ends_with(n, h) for n in names)]
    added = [h for h in present if h not in config.save_modules]
    return config.replace(save_modules=[*config.save_modules, *added]) if added else config


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the modules of `config.save_modules`, by full name. Raises TargetError for an entry that matches none."""
    if not config.save_modules:
        return {}
    names = module_names(model)
    for entry in config.save_modules:
        if not any(ends_with(name, entry) for name in names):
            raise TargetError(f"no module matches '{entry}' (LoraConfig.save_modules){_suggestion(entry, list(names))}")
    return _once_each({n: m for n, m in names.items() if any(ends_with(n, entry) for entry in config.save_modules)})


def _within(name: str, endings: list[str]) -> bool:
    """Whether a module's name, or that of a parent module, has one of these endings."""
    return any(f".{ending}." in f".{name}." for ending in endings)


def shortest_endings(chosen: list[str], every: list[str]) -> list[str]:
    """Shorten module names to their last parts if these match only `chosen` among all names (`every`)."""
    endings = {_last(name) for name in chosen}
    # A bare number ("0" in a Sequential) would match far too much in another model.
    if not any(e.isdigit() for e in endings) and {n for n in every if _last(n) in endings} == set(chosen):
        return sorted(endings)
    return sorted(chosen)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _once_each(chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Keep only the first name of each module: one registered under several names is adapted once, for all of them."""
    seen: dict[int, str] = {}
    for name, module in chosen.items():
        seen.setdefault(id(module), name)
    return {name: chosen[name] for name in seen.values()}


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def called_by_weight(names: dict[str, nn.Module]) -> dict[str, str]:
    """Modules whose weight is read without calling them, so that an adapted forward would never run."""
    found = {}
    for name, module in names.items():
        if attention_targets.why_not(module) is not None:
            found[f"{name}.out_proj"] = "nn.MultiheadAttention reads its weight without calling it"
        reads = reads_of(_own_class(module))
        for child in reads.read - reads.called:
            if child in module._modules:
                found[f"{name}.{child}"] = f"{_own_class(module).__name__} reads its weight without calling it"
    return found


def _bypassed_in_training(names: dict[str, nn.Module]) -> dict[str, str]:
    """Projections of a state-space mixer (Mamba's parameter A_log) that its fused kernel takes as weights, in training
    on a GPU, and that are called as modules elsewhere. PEFT refuses them too.
    """
    found = {}
    for name, module in names.items():
        if "A_log" not in module._parameters:
            continue
        reads = reads_of(_own_class(module))
        for child in reads.read & reads.called:
            if child in module._modules:
                found[f"{name}.{child}"] = (
                    f"{_own_class(module).__name__} reads its weight without calling it when its fused kernel runs"
                )
    return found


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what lorakit put in front of it."""
    cls = type(module)
    while issubclass(cls, Swapped):
        cls = mixin_and_base(cls)[1]
    return cls


def check_adaptable(names: dict[str, nn.Module], chosen: dict[str, nn.Module]) -> None:
    """Raise TargetError for a module without a low-rank update, or whose update would have no effect.

    `names`: all modules of the model; `chosen`: those to check.
    """
    not_called, fused = called_by_weight(names), fused_away(names)
    attention_targets.check_output(names, chosen)
    for name, module in chosen.items():
        if name in fused:
            raise TargetError(f"'{name}' cannot be adapted: {fused[name]}\n  {FIX}")
        if name in not_called:
            raise TargetError(
                f"'{name}' cannot be adapted: {not_called[name]}, so an update there would have no effect\n"
                "  exclude it (LoraConfig.exclude), or adapt the feed-forward layers next to it"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise TargetError(
                f"'{name}' is a {type(module).__name__} that has no shape yet\n  run the model once, then attach"
            )
        if mixin_for(module) is None:
            check_known(name, module)
            inside = [f"{name}.{n}" for n, m in module.named_modules() if n and mixin_for(m) is not None]
            fix = f"\n  it contains {listing(inside, 3)}" if inside else ""
            why = why_not(module) or attention_targets.why_not(module)
            raise TargetError(
                f"'{name}' is a {type(module).__name__}, which has no low-rank update{f': {why}' if why else ''}\n"
                f"  expected a Linear, Conv1D, Embedding, Conv1d/2d/3d or MultiheadAttention{fix}"
            )


def check_packed(name: str, module: nn.Module, parts: int) -> None:
    """Raise TargetError if the module is not a linear, or cannot be divided into `parts` equal parts."""
    if not is_linear(module):
        raise TargetError(f"'{name}' is a {type(module).__name__}; only a linear can be packed (LoraConfig.packed)")
    mixin = mixin_for(module)
    size_out = base_of(module).shape(module)[1 if mixin is not None and mixin.lora_transposed else 0]
    if size_out % parts:
        raise TargetError(
            f"'{name}' has {size_out} outputs, which cannot be divided into {parts} equal parts (LoraConfig.packed)"
        )


def _check_each_matches(names: list[str], targets: str | list[str], setting: str, others: Sequence[str] = ()) -> None:
    """Raise TargetError for a pattern or name ending that matches none of `names`. `setting`: the config's field;
    `others`: names in components of the pipeline that are not adapted.
    """
    if isinstance(targets, str):
        if not any(matches(name, targets) for name in names):
            count = sum(ends_with(name, targets) for name in names)
            if count:
                hint = (
                    "\n"
                    f"  a string is a regular expression for full names; use ['{targets}'] or '.*{targets}' for the "
                    f"{count} modules with this ending"
                )
            elif re.fullmatch(r"[\w.-]+", targets):
                hint = did_you_mean(targets, PRESETS) or _suggestion(targets, names)
            else:
                hint = "\n  a string is a regular expression for full names"
            raise TargetError(f"no module matches the pattern '{targets}' (LoraConfig.{setting}){hint}")
        return
    missing = [entry for entry in targets if not any(ends_with(name, entry) for name in names)]
    if missing:
        raise TargetError(
            "\n".join(
                f"no module matches {setting[:-1] if setting == 'targets' else setting} '{m}' "
                f"(LoraConfig.{setting}){_elsewhere(m, others) or _suggestion(m, names)}"
                for m in missing
            )
        )


def _elsewhere(entry: str, others: Sequence[str]) -> str:
    """Say in which other components of a pipeline there are modules with this ending."""
    found = dict.fromkeys(name.partition(".")[0] for name in others if ends_with(name, entry))
    return f"\n  there are some in {listing(found)}: LoraConfig(components=[...]) names what to adapt" if found else ""


def _suggestion(entry: str, names: list[str]) -> str:
    """Suggest the nearest ending of any module's name, and say how many modules have it."""
    if entry in names or any(ends_with(name, entry) for name in names):
        ending: str | None = entry
    else:
        depth = entry.count(".") + 1
        ending = nearest(
            entry, {".".join(name.split(".")[-depth:]) for name in names if not name.rsplit(".", 1)[-1].isdigit()}
        )
    if ending is None:
        lasts = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
        return (
            f"\n  names in this model end in: {listing(lasts, 20)}"
            if lasts
            else f"\n  names in this model: {listing(names, 10)}"
        )
    modules = [name for name in names if ends_with(name, ending)]
    if len(modules) == 1:
        return f"\n  did you mean '{ending}'? one module has this ending: {modules[0]}"
    return f"\n  did you mean '{ending}'? {len(modules)} modules have this ending, for example {modules[0]}"
