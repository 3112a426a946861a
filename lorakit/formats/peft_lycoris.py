"""What PEFT's LoHa and LoKr share: their keys and most of their config.

    <module>.<hada or lokr>_<part>, such as hada_w1_a
    base_model.model.<module>.<parameter>: modules_to_save, as beside a LoRA; there is no setting for biases

PEFT's scale is always alpha / r. A convolution's w1_b and w2_b are [r, in·k]; in Tucker form (`use_effective_conv2d`,
for all kernels of a file or none) [r, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..config import LoraConfig, variants
from ..errors import AdapterError
from .peft_config import from_peft
from .peft_kind import common

_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>hada|lokr)_(?P<part>w1_a|w1_b|w2_a|w2_b|w1|w2|t1|t2)(\.[^.]+)?")


def config(values: Mapping[str, Any], where: Path, variant: str) -> tuple[LoraConfig, bool]:
    """(our config, fan_in_fan_out) of a LoHa's or LoKr's config. AdapterError as in `from_peft`."""
    ours, transposed = from_peft(
        {**values, "peft_type": "LORA", "lora_alpha": values.get("alpha", 8), "lora_dropout": 0.0}, where
    )
    return ours.replace(variant=variant if variant in variants() else "lora"), transposed


def parts(
    kind: str, prefix: str, fields: tuple[str, ...], tensors: Mapping[str, Tensor], config: LoraConfig, where: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> its tensors by field, saved weights). `prefix`: of the kind's keys; `fields`: that the kind has.
    AdapterError for a wrong key.
    """
    found: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None and any(f".{m}." in f".{key}" for m in config.save_modules):
            saved[key] = tensor
            continue
        if match is None or match["kind"] != prefix:
            raise AdapterError(
                f"{where}: key '{key}' does not belong: peft_type is '{kind}', whose keys are "
                f"<module>.{prefix}_w1_a ..."
            )
        part = match["part"].replace("_", "")
        if part in found.setdefault(match["module"], {}):
            raise AdapterError(f"{where}: key '{key}': a second {part} for '{match['module']}'")
        found[match["module"]][part] = tensor
    for module, own in found.items():
        extra = sorted(own.keys() - set(fields))
        if extra:
            raise AdapterError(f"{where}: '{module}' has {', '.join(own)}; {kind} needs no {extra[0]}")
    return found, saved


def tensors_of(adapter: Adapter, prefix: str, kind: str) -> dict[str, Tensor]:
    """The tensors by PEFT's keys. `kind`: the prefix of the kind's keys."""
    return {
        f"{prefix}{module}.{kind}_{f'{name[:2]}_{name[2]}' if len(name) > 2 else name}": t
        for module, u in adapter.updates.items()
        for name, t in u.tensors().items()
    }


def fields(values: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The fields that LoHaConfig and LoKrConfig share, out of a LoraConfig's."""
    return common(values, "exclude_modules", "rank_pattern", "alpha_pattern") | {
        "alpha": values["lora_alpha"],
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "use_effective_conv2d": any("t2" in u.tensors() for u in adapter.updates.values()),
    }


def some_in_tucker_form(adapter: Adapter) -> list[str]:
    """A line if some products of kernels are in Tucker form and others are not."""
    kernels = [
        u.tensors()
        for u in adapter.updates.values()
        if any(size > 1 for size in u.weight_shape()[2:]) and "w2b" in u.tensors()
    ]
    if len({"t2" in tensors for tensors in kernels}) > 1:
        return ["kernels in Tucker form and others that are not: in PEFT either all are or none"]
    return []
