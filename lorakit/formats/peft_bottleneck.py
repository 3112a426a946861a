"""Bottleneck adapters, in a folder like PEFT's that only lorakit reads: PEFT has no such adapters.

    base_model.model.<module>.bottleneck_<down, down_bias, up, up_bias, norm or norm_bias>
    base_model.model.<module>.<parameter>      trained biases, modules_to_save

PEFT refuses it by its `peft_type` (KeyError: 'BOTTLENECK').
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.bottleneck import Bottleneck
from ..adapter.update import Update
from ..config import LoraConfig
from ..config.bottleneck import BottleneckShape
from ..errors import AdapterError
from .peft_config import checked, from_peft
from .peft_kind import PeftKind, common

_KEY = re.compile(r"(?P<module>.+)\.bottleneck_(?P<part>down|down_bias|up|up_bias|norm|norm_bias)")
_NEEDED = ("down", "down_bias", "up", "up_bias")


class _Bottleneck(PeftKind):
    peft_type, variant = "BOTTLENECK", "bottleneck"

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        alpha = LoraConfig.model_fields["alpha"].default
        ours, transposed = from_peft({**values, "peft_type": "LORA", "lora_alpha": alpha}, where)
        own = {name: values[name] for name in BottleneckShape.model_fields if name in values}
        return checked(where, lambda: ours.replace(variant=self.variant, **own)), transposed

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        saved: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is not None:
                found.setdefault(match["module"], {})[match["part"]] = tensor
            else:
                saved[key.replace(".base_layer.", ".")] = tensor
        made: dict[str, Update] = {}
        for module, parts in found.items():
            missing = [part for part in _NEEDED if part not in parts]
            if missing:
                raise AdapterError(f"{where}: '{module}' has no bottleneck_{missing[0]}")
            parts_of: dict[str, Any] = dict(parts)
            made[module] = Bottleneck(**parts_of, activation=config.activation, factor=config.bottleneck_scale)
        return made, saved

    def losses(self, adapter: Adapter) -> list[str]:
        if len({(u.activation, u.factor) for u in adapter.updates.values() if isinstance(u, Bottleneck)}) > 1:
            return ["bottlenecks with different non-linearities or factors: the folder has one for all modules"]
        return []

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        tensors = {
            f"{prefix}{m}.bottleneck_{part}": t for m, u in adapter.updates.items() for part, t in u.tensors().items()
        }
        ranks = {m: u.rank for m, u in adapter.updates.items()}
        return tensors, ranks, dict.fromkeys(ranks, adapter.config.alpha)

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        first = next(u for u in adapter.updates.values() if isinstance(u, Bottleneck))
        return common(values, "bias", "exclude_modules", "rank_pattern", "lora_dropout") | {
            "activation": first.activation,
            "bottleneck_norm": first.norm is not None,
            "bottleneck_scale": first.factor,
            "peft_type": self.peft_type,
            "reduction": adapter.config.reduction,
        }


KIND = _Bottleneck()
