"""PEFT's IA3 folder, read and written.

    base_model.model.<module>.ia3_l         [out, 1], of `feedforward_modules` [1, in]; convolutions [1, channels, 1...]
    base_model.model.<module>.<parameter>   modules_to_save

PEFT takes a module for a feed-forward's if its full name ends in one of `feedforward_modules`, which must be among
`target_modules`. Its files do not say how large a module's other side is; lorakit.json does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.ia3 import Ia3
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError, listing
from ..module_names import ends_with
from .peft_config import from_peft
from .peft_kind import PeftKind, common, trained_biases

_KEY = re.compile(r"(?P<module>.+)\.ia3_l(\.[^.]+)?")
_OTHER = "ia3_other_sizes"  # in lorakit.json: module -> the size of the side that it does not scale


class _Ia3(PeftKind):
    peft_type, variant = "IA3", "ia3"

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        defaults = LoraConfig.model_fields
        fields = {"peft_type": "LORA", "r": defaults["rank"].default, "lora_alpha": defaults["alpha"].default}
        ours, transposed = from_peft({**values, **fields}, where)
        named = values.get("feedforward_modules")
        named = sorted(named) if isinstance(named, list) else []
        return ours.replace(variant=self.variant, feedforward=named), transposed

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        found: dict[str, Update] = {}
        saved: dict[str, Tensor] = {}
        others, transposed = ours.pop(_OTHER, {}), bool(values.get("fan_in_fan_out"))
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                if ".lora_" in key or ".ia3_" in key:
                    raise AdapterError(
                        f"{where}: key '{key}' does not belong: peft_type is 'IA3', whose keys are <module>.ia3_l"
                    )
                saved[key.replace(".base_layer.", ".")] = tensor
                continue
            module = match["module"]
            if module in found:
                raise AdapterError(f"{where}: key '{key}': a second vector for '{module}'")
            other = others.get(module) if isinstance(others, Mapping) else None
            other = other if type(other) is int and other > 0 else None
            across = transposed and tensor.dim() == 2
            feedforward = _feedforward(module, key, tensor, values.get("feedforward_modules"), where)
            found[module] = Ia3(tensor.flatten(), feedforward, tensor.dim(), other, across)
        return found, saved

    def losses(self, adapter: Adapter) -> list[str]:
        scales = _scales(adapter)
        lines = trained_biases(adapter, "IA3")
        thin = [m for m, u in scales.items() if u.axes == 3]
        if thin:
            lines.append(f"{len(thin)} Conv1d ({listing(thin, 2)}): PEFT's IA3 has linears, Conv2d and Conv3d")
        if len({u.transposed for u in scales.values() if u.axes == 2}) > 1:
            lines.append("linears stored as [in, out] beside others: PEFT's IA3 has one fan_in_fan_out for all")
        return lines

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        scales = _scales(adapter)
        tensors = {f"{prefix}{m}.ia3_l": u.vector.reshape(_shape(u)) for m, u in scales.items()}
        return tensors, dict.fromkeys(scales, adapter.config.rank), dict.fromkeys(scales, adapter.config.alpha)

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        scales = _scales(adapter)
        own = common(values, "exclude_modules")
        for name in ("r", "layers_pattern", "layers_to_transform"):
            del own[name]
        targets, feedforward = _named(scales, values["target_modules"])
        return own | {
            "fan_in_fan_out": any(u.transposed for u in scales.values()),
            "feedforward_modules": feedforward,
            "init_ia3_weights": True,
            "peft_type": self.peft_type,
            "target_modules": targets,
        }

    def ours(self, adapter: Adapter) -> dict[str, Any]:
        known = {m: u.other for m, u in _scales(adapter).items() if u.other is not None}
        return {_OTHER: known} if known else {}


KIND = _Ia3()


def _scales(adapter: Adapter) -> dict[str, Ia3]:
    return {m: u for m, u in adapter.updates.items() if isinstance(u, Ia3)}


def _shape(update: Ia3) -> tuple[int, ...]:
    if update.axes > 2:
        return (1, -1, *(1 for _ in range(update.axes - 2)))
    return (1, -1) if update.feedforward else (-1, 1)


def _feedforward(module: str, key: str, tensor: Tensor, named: Any, where: Path) -> bool:
    """Whether a vector is of a module's inputs, as PEFT finds it. AdapterError if its shape is another one's."""
    shape = list(tensor.shape)
    if isinstance(named, str):
        feedforward = re.fullmatch(named, module) is not None
    else:
        feedforward = any(module.endswith(str(entry)) for entry in named or ())
    expected = tensor.dim() > 2 or shape[0 if feedforward else -1] == 1
    if tensor.dim() < 2 or not expected or (tensor.dim() > 2 and tensor.numel() != shape[1]):
        form = "[1, in]" if feedforward else "[out, 1]"
        raise AdapterError(
            f"{where}: key '{key}' has shape {shape}; expected {form}, since feedforward_modules "
            f"{'names' if feedforward else 'does not name'} '{module}'"
        )
    return feedforward


def _named(scales: Mapping[str, Ia3], targets: Any) -> tuple[list[str], list[str]]:
    """Return (target_modules, feedforward_modules) that PEFT reads as these updates: the config's name endings if each
    of them, and the end of a name as text, is of modules of one sort; else full names.
    """
    sorts = {m: u.feedforward for m, u in scales.items()}
    if isinstance(targets, list):
        of = {entry: {kind for m, kind in sorts.items() if ends_with(m, entry)} for entry in targets}
        inputs = sorted(entry for entry, kinds in of.items() if kinds == {True})
        read = {m: any(m.endswith(entry) for entry in inputs) for m in sorts}
        if all(len(kinds) == 1 for kinds in of.values()) and read == sorts:
            return sorted(targets), inputs
    return sorted(sorts), sorted(m for m, kind in sorts.items() if kind)
