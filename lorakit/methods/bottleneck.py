"""Bottleneck adapters: small networks behind the sublayers of each layer (Houlsby et al. 2019, and their descendants).

The four that the LoRA paper compares with (Hu et al. 2021, section 5.1), and its AdapterDrop:

    houlsby     behind the output projections of attention and of the feed-forward (AdapterH)
    pfeiffer    behind that of the feed-forward alone (AdapterP, Pfeiffer et al. 2021)
    adapter_l   the same with a LayerNorm of its own (AdapterL, Lin et al. 2020)
    drop_layers none in the first layers (AdapterD, Rücklé et al. 2020)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..config import LoraConfig, Narrowed, RunSettings, Strict, part
from ..config.bottleneck import BottleneckShape
from ..errors import ConfigError
from .method import Start, StartData
from .shared.adapter import (  # noqa: F401 (names of the method)
    Earlier,
    activate,
    after_step,
    alone,
    attach_adapter,
    base_alone,
    cheaper,
    check_result,
    flags,
    keeps_base,
    note_together,
    penalty,
    precision,
    rate_factors,
    reloaded,
    result,
    save,
    start_from,
)

_KIND = "bottleneck"


class BottleneckSettings(Strict):
    bottleneck: Literal["houlsby", "pfeiffer", "adapter_l"] = Field(
        "houlsby",
        description="where adapters stand: houlsby: behind attention and feed-forward; pfeiffer: behind the "
        "feed-forward; adapter_l: there, with a LayerNorm of their own",
    )
    bottleneck_size: int = Field(64, ge=1, description="inner size of the adapters")
    drop_layers: int = Field(0, ge=0, description="AdapterDrop: no adapters in this many first layers")

    @field_validator("bottleneck", mode="before")
    @classmethod
    def _has_no_block(cls, value: Any) -> Any:
        if value == "parallel":
            raise ValueError(
                "parallel adapters (He et al. 2021) read the input of a feed-forward as a block, and lorakit adapts "
                "linears; give houlsby, pfeiffer or adapter_l"
            )
        return value


class BottleneckRunSettings(Narrowed, BottleneckSettings, BottleneckShape, Earlier):
    @model_validator(mode="after")
    def _one_size(self):
        default = BottleneckSettings.model_fields["bottleneck_size"].default
        if self.reduction is not None and self.bottleneck_size != default:
            raise ValueError(
                f"bottleneck_size ({self.bottleneck_size}) has no effect with reduction ({self.reduction:g}), which "
                "gives each module a size of its own; give one of them"
            )
        return self


settings = BottleneckRunSettings
defaults: dict[str, Any] = {}
title = "bottleneck"
summary = "train bottleneck adapters behind attention and feed-forward"


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    own, shape = part(config, BottleneckSettings), part(config, BottleneckShape)
    return LoraConfig(
        **part(config, Narrowed).model_dump(),
        **shape.model_dump() | ({"bottleneck_norm": True} if own.bottleneck == "adapter_l" else {}),
        **({"rank": own.bottleneck_size} if shape.reduction is None else {}),
        targets="houlsby" if own.bottleneck == "houlsby" else "pfeiffer",
        variant=_KIND,
        base=config.model,
        revision=config.revision,
        task=task_type,
    )


def start(config: RunSettings) -> Start | None:
    found = start_from(config, {*Narrowed.model_fields, *BottleneckShape.model_fields}, _KIND)
    if found is None:
        return None
    own = _made_with(found)
    if found.settings["reduction"] is not None:
        del own["bottleneck_size"]
    return replace(found, settings={**found.settings, **own})


def _made_with(earlier: Start) -> dict[str, Any]:
    """Return the `BottleneckSettings` of an adapter: those of the run that trained it, or what its updates show."""
    recipe = earlier.metadata.get("recipe")
    if isinstance(recipe, Mapping) and recipe.get("method") == _KIND:
        return {name: recipe.get(name, field.default) for name, field in BottleneckSettings.model_fields.items()}
    from ..adapter.adapter import Adapter
    from ..layers.targets import layer_number

    updates = Adapter.load(earlier.source).updates
    numbers = {m: number for m in updates if (number := layer_number(m)) is not None}
    layers = Counter(m.partition(f".{number}.")[0] + f".{number}" for m, number in numbers.items())
    own_norm = any("norm" in update.tensors() for update in updates.values())
    one_each = max(layers.values(), default=2) == 1
    return {
        "bottleneck": "houlsby" if not one_each else "adapter_l" if own_norm else "pfeiffer",
        "bottleneck_size": Counter(update.rank for update in updates.values()).most_common(1)[0][0],
        "drop_layers": min(numbers.values(), default=0),
    }


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    """LoRA's own. GPT-3's was half of it (Hu et al. 2021, Table 12); on the embedded model both gain alike from more:
    after 40 steps of 8 rows of E2E the held-out loss is 1.80 at this rate and 1.59 at twice it, LoRA's 1.73 and 1.52.
    """
    return rate, f"as for LoRA, {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    fresh = adapter_config(config, task_type)
    drop = part(config, BottleneckSettings).drop_layers
    if drop and part(config, Earlier).adapter is None:
        fresh = _without_first(model, fresh, drop)
    attach_adapter(model, fresh, config, name, task_type, first)


def _without_first(model: Any, fresh: LoraConfig, drop: int) -> LoraConfig:
    """Return the config with adapters from layer `drop` on. Raises ConfigError if there are no such layers."""
    from ..bases.pipeline import as_module
    from ..layers.targets import find_targets, layer_number

    every = find_targets(as_module(model), fresh.replace(layers=None, layers_pattern=[])).modules
    numbers = {number for name in every if (number := layer_number(name, fresh.layers_pattern)) is not None}
    left = sorted(n for n in numbers if n >= drop and (fresh.layers is None or n in fresh.layers))
    if not left:
        raise ConfigError(
            f"drop_layers: {drop}: no layer is left to adapt; the model has {len(numbers)}\n  give a smaller number"
        )
    return fresh.replace(layers=left)


def trained(config: RunSettings) -> str:
    own, shape = part(config, BottleneckSettings), part(config, BottleneckShape)
    size = f"size {own.bottleneck_size}" if shape.reduction is None else f"reduction {shape.reduction:g}"
    dropped = f", none in the first {own.drop_layers} layers" if own.drop_layers else ""
    return f"{own.bottleneck}, {size}, {shape.activation}{dropped}; PEFT does not read the result"
