"""PEFT's LoHa folder, read and written.

<module>.hada_w1_a, .hada_w1_b, .hada_w2_a, .hada_w2_b, in Tucker form .hada_t1, .hada_t2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.loha import Loha
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError
from . import peft_lycoris
from .peft_kind import PeftKind, trained_biases

_FIELDS = ("w1a", "w1b", "w2a", "w2b", "t1", "t2")


class _Loha(PeftKind):
    peft_type, variant = "LOHA", "loha"

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        return peft_lycoris.config(values, where, self.variant)

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        found, saved = peft_lycoris.parts(self.peft_type, "hada", _FIELDS, tensors, config, where)
        made: dict[str, Update] = {}
        for module, parts in found.items():
            lacking = sorted({"w1a", "w1b", "w2a", "w2b"} - parts.keys())
            if lacking:
                raise AdapterError(f"{where}: '{module}' has {', '.join(parts)}; LOHA needs {', '.join(lacking)}")
            fields: dict[str, Any] = {"alpha": config.alpha_of(module), **parts}
            made[module] = Loha(**fields)
        return made, saved

    def losses(self, adapter: Adapter) -> list[str]:
        return trained_biases(adapter, "LoHa") + peft_lycoris.some_in_tucker_form(adapter)

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        found = {m: u for m, u in adapter.updates.items() if isinstance(u, Loha)}
        alphas = {m: u.alpha for m, u in found.items()}
        return peft_lycoris.tensors_of(adapter, prefix, "hada"), {m: u.rank for m, u in found.items()}, alphas

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        return peft_lycoris.fields(values, adapter) | {"peft_type": self.peft_type}


KIND = _Loha()
