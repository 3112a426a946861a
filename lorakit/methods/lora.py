"""LoRA: train low-rank updates of frozen weights and save an adapter (Hu et al. 2021).

A run may start from an earlier adapter: from its factors and its saved modules, with a new optimizer. What an adapter
is (rank, targets, ...) comes from it then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import Choice, LoraConfig, LoraSettings, RunSettings, part, variants
from ..errors import AdapterError, ConfigError
from .method import Start, StartData

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..adapter.adapter import Adapter


class LoraRunSettings(LoraSettings):
    adapter: str | None = Field(
        None,
        description="an adapter to start from (a folder, a file or a hub id), with a new optimizer; it decides rank, "
        "targets and the like",
    )


# Settings that an adapter does not fix: they act in training only.
_IN_TRAINING = {"dropout", "lora_plus", "freeze_a"}
_NOT_FIXED = {*_IN_TRAINING, "adapter"}
# Settings that an adapter holds resolved to the modules of its base. Its recipe has them as the run gave them.
_RESOLVED = {
    "targets",
    "components",
    "exclude",
    "layers",
    "save_modules",
    "rank_pattern",
    "alpha_pattern",
    "init",
    "eva_rho",
    "init_batches",
    "trainable_tokens",
}

# Settings by which a run may train what the format of its result cannot hold.
_DECIDE_WHAT_IS_SAVED = ("adapter", "variant", "targets", "trainable_tokens", "bias", "save_modules", "packed")

settings = LoraRunSettings
title = "LoRA"
summary = "train an adapter"
result = "adapter"
keeps_base = True


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    return LoraConfig(
        **part(config, LoraSettings).model_dump(), base=config.model, revision=config.revision, task=task_type
    )


def start(config: RunSettings) -> Start | None:
    source = part(config, LoraRunSettings).adapter
    if source is None:
        return None
    from ..bases.vocabulary import recorded_tokens

    adapter = _load(source)
    fixed = {name: getattr(adapter.config, name) for name in LoraSettings.model_fields if name not in _NOT_FIXED}
    kinds = {update.variant for update in adapter.updates.values()}
    kinds -= {"tokens"} if len(kinds) > 1 else set()  # beside the others
    if len(kinds) == 1 and kinds <= {*variants()}:  # factors of experts are a LoRA's
        fixed["variant"] = kinds.pop()
    recipe = adapter.metadata.get("recipe")
    spellings = {}
    if isinstance(recipe, Mapping):  # lorakit's own run, which leaves out defaults
        # A start that was subtracted has twice the run's rank and alpha.
        for name in _RESOLVED | ({"rank", "alpha"} if "init" in recipe else set()):
            default = LoraSettings.model_fields[name].get_default(call_default_factory=True)
            spellings[name] = recipe.get(name, default)
    if added := recorded_tokens(adapter.metadata):
        fixed["add_tokens"] = sorted(added, key=lambda token: added[token])
    about = adapter.metadata.get("data")
    own = adapter.config
    return Start(
        source, fixed, spellings, own.task, own.base, own.revision, about if isinstance(about, Mapping) else {}
    )


def _load(source: str) -> Adapter:
    from ..adapter.adapter import Adapter

    adapter = Adapter.load(source)
    if adapter.embeddings:
        raise AdapterError(
            f"{source}: it has textual-inversion embeddings ({', '.join(list(adapter.embeddings)[:3])}), which this "
            "training cannot go on with"
        )
    return adapter


def precision(config: RunSettings, device: torch.device) -> Choice:
    from ..bases.device import choose_dtype

    return choose_dtype(config.precision, device)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate, why


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    from ..adapter.fingerprint import ONLY_ON
    from ..bases.pipeline import as_module
    from ..model.attach import attach, attach_from
    from ..model.known_base import base_fingerprint
    from ..model.start import Sources

    own = part(config, LoraRunSettings)
    if own.adapter is None:
        sources = Sources(model) if first is None else Sources(model, first.batches, first.loss, None, first.ranks)
        attach_from(model, adapter_config(config, task_type), sources, name)
        _check(model, config, name)
        return
    earlier = _load(own.adapter)
    in_training = {setting: getattr(own, setting) for setting in _IN_TRAINING}
    continued = earlier.config.replace(**in_training, task=task_type, base=config.model, revision=config.revision)
    known = earlier.metadata.get("fingerprint") or base_fingerprint(as_module(model), earlier.updates)
    metadata = {"fingerprint": known, "started_from": _lineage(earlier, own.adapter)}
    metadata |= {ONLY_ON: earlier.metadata[ONLY_ON]} if ONLY_ON in earlier.metadata else {}
    attach(model, replace(earlier, config=continued, metadata=metadata), name, trainable=True)
    _check(model, config, name)


def _check(model: Any, config: RunSettings, name: str) -> None:
    """Raise ConfigError for settings of the run that have no effect on the attached adapter, or do not go with it."""
    from ..bases.pipeline import as_module
    from ..model.training import cannot_average

    rate_factors(model, config, name)
    kind = cannot_average(as_module(model), name)
    if kind is not None and getattr(config, "ema", 0.0) > 0:
        raise ConfigError(
            f"ema: averages of {kind} over steps are not what was trained: it sets values to zero\n"
            "  omit ema, or use another variant"
        )


def check_result(model: Any, config: RunSettings, name: str, unsaved: Callable[[Any], str | None]) -> None:
    from ..model.capture import as_value

    why = unsaved(as_value(model, name))
    if why is None:
        return
    own = part(config, LoraRunSettings)
    defaults = {n: field.get_default(call_default_factory=True) for n, field in LoraRunSettings.model_fields.items()}
    given = [n for n in _DECIDE_WHAT_IS_SAVED if getattr(own, n) != defaults[n]]
    beside = [n for n in given if n not in ("adapter", "variant")]
    if "trainable_tokens" in beside and getattr(config, "add_tokens", []):
        beside.append("add_tokens")
    ways = [f"change or omit {' or '.join(beside)}"] if beside else []
    ways += [f"start from another adapter than {own.adapter}"] if own.adapter else []
    ways += ["use variant: lora"] if own.variant != "lora" and not own.adapter else []
    settings = "".join(f"{n}: {getattr(own, n)}: " for n in given)
    raise ConfigError(f"{settings}the result could not be saved\n  {why}\n  {', or '.join(ways) or 'adapt less'}")


def _lineage(adapter: Adapter, source: str) -> dict[str, Any]:
    """Describe the adapter that a run starts from, for the result's metadata: its name, a hash of its values, and its
    own data, metrics and lineage.
    """
    kept = {name: adapter.metadata[name] for name in ("data", "metrics", "started_from") if name in adapter.metadata}
    return {"adapter": Path(source).name, "sha256": adapter.digest(), **kept}


def rate_factors(model: Any, config: RunSettings, name: str) -> Mapping[nn.Parameter, tuple[str, float]]:
    """LoRA+: those of B."""
    from ..bases.pipeline import as_module
    from ..model.training import faster_parameters

    ratio = part(config, LoraSettings).lora_plus
    return {} if ratio is None else dict.fromkeys(faster_parameters(as_module(model), name), ("B", ratio))


def penalty(model: Any, name: str) -> Tensor | None:
    from ..bases.pipeline import as_module
    from ..model.training import penalties

    found = penalties(as_module(model), name)
    return sum(found[1:], start=found[0]) if found else None


def after_step(model: Any, name: str, step: int, steps: int) -> None:
    from ..model.training import after_step

    after_step(model, step, steps, name)


def activate(model: Any, name: str) -> None:
    from ..model.activate import activate

    activate(model, name)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    from ..model.activate import activate, active

    before = active(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


@contextmanager
def reloaded(model: Any, folder: Path) -> Iterator[None]:
    from ..adapter.adapter import Adapter
    from ..model.activate import activate, active
    from ..model.attach import attach
    from ..model.detach import detach

    before = active(model)
    attach(model, Adapter.load(folder), "reloaded", force=True)  # the base is the one it was trained on
    try:
        yield
    finally:
        detach(model, "reloaded")
        activate(model, before)


def save(
    model: Any,
    processor: Any,
    name: str,
    folder: Path,
    metadata: dict[str, Any],
    write: Callable[[Any, Path], None] | None = None,
) -> None:
    from ..model.capture import capture

    adapter = capture(model, name)
    adapter = replace(adapter, metadata={**adapter.metadata, **metadata})
    if write is None:
        adapter.save(folder)
    else:
        write(adapter, folder)


def trained(config: RunSettings) -> str:
    own = part(config, LoraRunSettings)
    start = f", starting from {own.adapter}" if own.adapter else "" if own.init == "default" else f", init {own.init}"
    kind = "" if own.variant == "lora" else f"{own.variant}, "
    ways = (", rslora" if own.rslora else "") + (", A frozen" if own.freeze_a else "")
    ways += f", B at {own.lora_plus:g} times A's rate" if own.lora_plus else ""
    return f"{kind}rank {own.rank}, alpha {own.alpha:g}{start}{ways}"


def note_together(config: RunSettings) -> str | None:
    return (
        "dropout masks depend on the sweep; the same run alone would draw different ones"
        if part(config, LoraSettings).dropout
        else None
    )


def alone(config: RunSettings) -> tuple[str, str] | None:
    for name, empty in (("save_modules", []), ("bias", "none")):
        value = getattr(config, name)
        if value != empty:
            return name, (
                f"{name}: {value}: a sweep does not train copies of base weights side by side in one forward pass yet\n"
                f"  omit {name}, or start these runs one by one with lorakit train"
            )
    return None


def cheaper() -> str | None:
    return None


def flags(model: str, result: str) -> str:
    return f"--model {quote(model)} --adapter {quote(result)}"
