"""PEFT's LoHa, read and written, and its LoKr, read.

    <module>.hada_w1_a, .hada_w1_b, .hada_w2_a, .hada_w2_b, in Tucker form .hada_t1, .hada_t2
    <module>.lokr_w1 or .lokr_w1_a, .lokr_w1_b; .lokr_w2 or .lokr_w2_a, .lokr_w2_b, .lokr_t2

    base_model.model.<module>.<parameter>: modules_to_save, as beside a LoRA; there is no setting for biases

PEFT's scale is always alpha / r; LyCORIS' is 1 for a LoKr of two full matrices, so there the scale goes into W1. A
convolution's w1_b and w2_b are [r, in·k]; in Tucker form (`use_effective_conv2d`, for all kernels of a file or none)
[r, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.loha import Loha
from ..adapter.lokr import Lokr
from ..adapter.update import Update
from ..config import LoraConfig, variants
from ..errors import AdapterError, listing
from .peft_config import from_peft
from .scale import folded

KINDS = {"LOHA": "hada", "LOKR": "lokr"}
# The fields that LoHaConfig and LoraConfig share.
_COMMON = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
)
_NEEDED = {"LOHA": {"w1a", "w1b", "w2a", "w2b"}, "LOKR": set()}
_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>hada|lokr)_(?P<part>w1_a|w1_b|w2_a|w2_b|w1|w2|t1|t2)(\.[^.]+)?")


def config(values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
    """(our config, fan_in_fan_out) of a LoHa's or LoKr's config. AdapterError as in `from_peft`."""
    variant = str(values["peft_type"]).lower()
    ours, transposed = from_peft(
        {**values, "peft_type": "LORA", "lora_alpha": values.get("alpha", 8), "lora_dropout": 0.0}, where
    )
    return ours.replace(variant=variant if variant in variants() else "lora"), transposed


def updates(
    kind: str, tensors: Mapping[str, Tensor], config: LoraConfig, where: Path
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """(module -> its update, saved weights). `tensors`: by key without PEFT's prefix. AdapterError for a wrong key."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None and any(f".{m}." in f".{key}" for m in config.save_modules):
            saved[key] = tensor
            continue
        if match is None or match["kind"] != KINDS[kind]:
            raise AdapterError(
                f"{where}: key '{key}' does not belong: peft_type is '{kind}', whose keys are "
                f"<module>.{KINDS[kind]}_w1_a ..."
            )
        part = match["part"].replace("_", "")
        if part in parts.setdefault(match["module"], {}):
            raise AdapterError(f"{where}: key '{key}': a second {part} for '{match['module']}'")
        parts[match["module"]][part] = tensor
    made: dict[str, Update] = {}
    for module, found in parts.items():
        lacking = sorted(_NEEDED[kind] - found.keys())
        extra = sorted(found.keys() - ({"w1a", "w1b", "w2a", "w2b", "t1", "t2"} if kind == "LOHA" else {*_LOKR}))
        if lacking or extra:
            raise AdapterError(
                f"{where}: '{module}' has {', '.join(found)}; {kind} needs {', '.join(lacking) or 'no ' + extra[0]}"
            )
        made[module] = _loha(module, found, config) if kind == "LOHA" else _lokr(module, found, config)
    return made, saved


def is_loha(adapter: Adapter) -> bool:
    """Whether all updates are LoHa. A folder of PEFT holds one kind."""
    return {u.variant for u in adapter.updates.values()} == {"loha"}


def losses(adapter: Adapter) -> list[str]:
    """What PEFT's LoHa folder cannot hold of an adapter whose updates are LoHa."""
    biases = [
        n
        for n in adapter.saved
        if n.endswith(".bias") and not any(f".{m}." in f".{n}" for m in adapter.config.save_modules)
    ]
    lost = [f"{len(biases)} trained biases ({listing(biases, 2)}): PEFT's LoHa has none"] if biases else []
    kernels = [u for u in adapter.updates.values() if any(size > 1 for size in u.weight_shape()[2:])]
    if len({"t1" in u.tensors() for u in kernels}) > 1:
        lost.append("kernels in Tucker form and others that are not: in PEFT either all are or none")
    return lost


def tensors_of(adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """The tensors by PEFT's keys, and each module's rank and alpha."""
    tensors = {
        f"{prefix}{module}.hada_{name if name[0] == 't' else f'{name[:2]}_{name[2]}'}": t
        for module, u in adapter.updates.items()
        for name, t in u.tensors().items()
    }
    found = {m: u for m, u in adapter.updates.items() if isinstance(u, Loha)}
    return tensors, {m: u.rank for m, u in found.items()}, {m: u.alpha for m, u in found.items()}


def to_loha(values: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """A LoHaConfig's fields out of a LoraConfig's."""
    tucker = any("t1" in u.tensors() for u in adapter.updates.values())
    return {name: values[name] for name in _COMMON} | {
        "alpha": values["lora_alpha"],
        "init_weights": True,
        "module_dropout": 0.0,
        "peft_type": "LOHA",
        "rank_dropout": 0.0,
        "use_effective_conv2d": tucker,
    }


_LOKR = ("w1", "w1a", "w1b", "w2", "w2a", "w2b", "t2")


def _loha(module: str, found: dict[str, Tensor], config: LoraConfig) -> Loha:
    fields: dict[str, Any] = {"alpha": config.alpha_of(module), **found}
    return Loha(**fields)


def _lokr(module: str, found: dict[str, Tensor], config: LoraConfig) -> Lokr:
    alpha = config.alpha_of(module)
    if "w1" in found and "w2" in found:
        found = found | {"w1": folded(found["w1"], alpha / config.rank_of(module))}
    fields: dict[str, Any] = {"alpha": alpha, **found}
    return Lokr(**fields)
