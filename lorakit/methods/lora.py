"""LoRA: train low-rank updates of frozen weights and save an adapter (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..config import VIRTUAL, LoraConfig, LoraSettings, RunSettings, part
from ..errors import ConfigError
from .method import Start, StartData
from .shared import virtual_tokens
from .shared.adapter import (  # noqa: F401 (names of the method)
    Earlier,
    activate,
    after_step,
    attach_adapter,
    base_alone,
    cheaper,
    flags,
    keeps_base,
    learning_rate,
    penalty,
    precision,
    reloaded,
    result,
    save,
    start_from,
)
from .shared.adapter import alone as alone_of_adapters

if TYPE_CHECKING:
    from torch import nn


class LoraRunSettings(LoraSettings, Earlier):
    pass


# Settings by which a run may train what the format of its result cannot hold.
_DECIDE_WHAT_IS_SAVED = ("adapter", "variant", "targets", "trainable_tokens", "bias", "save_modules", "packed")

settings = LoraRunSettings
defaults: dict[str, Any] = {}
title = "LoRA"
summary = "train an adapter"


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    return LoraConfig(
        **part(config, LoraSettings).model_dump(), base=config.model, revision=config.revision, task=task_type
    )


def start(config: RunSettings) -> Start | None:
    found = start_from(config, LoraSettings.model_fields)
    kind = part(config, LoraSettings).variant if found is None else found.settings["variant"]
    if kind in VIRTUAL:
        raise ConfigError(
            f"variant: {kind}: method: lora trains updates of modules; virtual tokens alone are a method of their own\n"
            f"  use method: {kind}; or prompt: {kind}, for virtual tokens beside LoRA"
        )
    return found


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    virtual_tokens.check_run(config)
    attach_adapter(model, adapter_config(config, task_type), config, name, task_type, first)
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


def rate_factors(model: Any, config: RunSettings, name: str) -> Mapping[nn.Parameter, tuple[str, float]]:
    """LoRA+: those of B. Virtual tokens have a rate of their own too."""
    from ..bases.pipeline import as_module
    from ..model.training import faster_parameters

    ratio = part(config, LoraSettings).lora_plus
    faster = {} if ratio is None else dict.fromkeys(faster_parameters(as_module(model), name), ("B", ratio))
    return {**faster, **virtual_tokens.rate_factors_beside(model, config, name)}


def trained(config: RunSettings) -> str:
    own = part(config, LoraRunSettings)
    start = f", starting from {own.adapter}" if own.adapter else "" if own.init == "default" else f", init {own.init}"
    kind = "" if own.variant == "lora" else f"{own.variant}, "
    ways = (", rslora" if own.rslora else "") + (", A frozen" if own.freeze_a else "")
    ways += f", B at {own.lora_plus:g} times A's rate" if own.lora_plus else ""
    tokens = f", {virtual_tokens.described(config)}" if own.prompt else ""
    return f"{kind}rank {own.rank}, alpha {own.alpha:g}{start}{ways}{tokens}"


def alone(config: RunSettings) -> tuple[str, str] | None:
    return virtual_tokens.alone(config) if part(config, LoraSettings).prompt else alone_of_adapters(config)


def note_together(config: RunSettings) -> str | None:
    return (
        "dropout masks depend on the sweep; the same run alone would draw different ones"
        if part(config, LoraSettings).dropout
        else None
    )
