"""What prefix tuning, prompt tuning and P-tuning do alike, and LoRA with virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config import LoraConfig, RunSettings, Saved, VirtualTokenSettings, encoder_of, part, virtual_kind
from ...config.virtual_tokens import VirtualKind
from ...errors import ConfigError
from ..method import Start, StartData
from .adapter import Earlier, attach_adapter, start_from

if TYPE_CHECKING:
    from torch import nn

    from ...layers.virtual.tokens import VirtualUpdate

# Learning rates as multiples of LoRA's, by kind and encoder: the best of 0.001, 0.003, ..., 1 in 30 steps on E2E with
# the embedded model, whose LoRA has 0.0037 there (docs/methods.md).
# P-tuning goes on without an encoder from PEFT's files, which have none: it trains the vectors then, as prompt tuning.
FACTORS: dict[tuple[VirtualKind, str], float] = {
    ("prefix", "none"): 80.0,
    ("prefix", "mlp"): 4.0,
    ("prompt", "none"): 10.0,
    ("p_tuning", "none"): 10.0,
    ("p_tuning", "mlp"): 1.0,
    ("p_tuning", "lstm"): 1.0,
}


class VirtualRunSettings(VirtualTokenSettings, Saved, Earlier):
    """The settings of a method that trains virtual tokens alone."""


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    return LoraConfig(
        variant=config.method,
        **part(config, VirtualTokenSettings).model_dump(),
        **part(config, Saved).model_dump(),
        base=config.model,
        revision=config.revision,
        task=task_type,
    )


def start(config: RunSettings) -> Start | None:
    return start_from(config, {*VirtualTokenSettings.model_fields, *Saved.model_fields}, config.method)


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    check_run(config)
    attach_adapter(model, adapter_config(config, task_type), config, name, task_type, first)


def check_run(config: RunSettings) -> None:
    """Raise ConfigError for settings of a run that do not go with virtual tokens."""
    kind = virtual_kind(config)
    if kind is None:
        return
    if getattr(config, "packing", False):
        raise ConfigError(
            f"packing: virtual tokens ({kind}) stand in front of a sequence, and so of the first of its packed rows "
            "alone\n  omit packing; group_by_length keeps padding low"
        )
    if kind == "prefix" and config.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing: a prefix is put into the key-value cache, which transformers drops there\n"
            "  omit gradient_checkpointing, or use prompt tuning"
        )


def learning_rate(rate: float, why: str, kind: VirtualKind) -> tuple[float, str]:
    """Return the rate that suits virtual tokens of this kind with their default encoder."""
    factor = FACTORS[kind, encoder_of(kind, VirtualTokenSettings())]
    return (rate, f"LoRA's {why}") if factor == 1 else (rate * factor, f"{factor:g} times LoRA's rate {why}")


def rate_factors(model: Any, config: RunSettings, name: str) -> dict[nn.Parameter, tuple[str, float]]:
    """Return the parameters of another encoder than the default, with the rate that suits it if the run's is auto."""
    kind = virtual_kind(config)
    assert kind is not None
    update = _update(model, name)
    ratio = FACTORS[kind, update.network] / FACTORS[kind, encoder_of(kind, VirtualTokenSettings())]
    if config.learning_rate != "auto" or ratio == 1:
        return {}
    return dict.fromkeys(update.parameters(), ("virtual" if update.encoder is None else "encoder", ratio))


def rate_factors_beside(model: Any, config: RunSettings, name: str) -> dict[nn.Parameter, tuple[str, float]]:
    """Return the parameters of virtual tokens beside LoRA, with their rate as a multiple of LoRA's."""
    kind = virtual_kind(config)
    if kind is None:
        return {}
    update = _update(model, name)
    return dict.fromkeys(update.parameters(), ("virtual", FACTORS[kind, update.network]))


def _update(model: Any, name: str) -> VirtualUpdate:
    from ...adapter.virtual_tokens import BODY
    from ...bases.pipeline import as_module
    from ...layers.layer import child_name

    update: VirtualUpdate = getattr(as_module(model).get_submodule(BODY), child_name(name))
    return update


def alone(config: RunSettings) -> tuple[str, str]:
    """Return the setting that keeps a run with virtual tokens out of a sweep, and the sweep's error message."""
    beside = getattr(config, "prompt", None)
    setting = f"prompt: {beside}" if beside else f"method: {config.method}"
    return setting, (
        f"{setting} puts virtual tokens in front of each row, and a sweep's runs share the rows of one forward pass\n"
        "  start these runs one by one with lorakit train"
    )


def described(config: RunSettings) -> str:
    """Describe a run's virtual tokens: "20 virtual tokens (prefix, mlp)"."""
    kind, own = virtual_kind(config), part(config, VirtualTokenSettings)
    assert kind is not None
    network = encoder_of(kind, own)
    # P-tuning's config has no way to say that an adapter came without its encoder.
    unsaid = network == "none" or (kind == "p_tuning" and part(config, Earlier).adapter is not None)
    how = kind if unsaid else f"{kind}, {network}"
    return f"{own.virtual_tokens} virtual tokens ({how})"
