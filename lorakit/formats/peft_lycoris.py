"""PEFT's LoHa and LoKr adapters, read as the factor kinds that they are.

    <module>.hada_w1_a, .hada_w1_b, .hada_w2_a, .hada_w2_b, in Tucker form .hada_t1, .hada_t2
    <module>.lokr_w1 or .lokr_w1_a, .lokr_w1_b; .lokr_w2 or .lokr_w2_a, .lokr_w2_b, .lokr_t2

PEFT's scale is alpha / r always; LyCORIS' own is 1 for a LoKr of two whole matrices, so there the scale goes into W1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.loha import Hadamard
from ..adapter.lokr import Kronecker
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError
from .peft_config import from_peft
from .strength import folded

KINDS = {"LOHA": "hada", "LOKR": "lokr"}
_NEEDED = {"LOHA": {"w1a", "w1b", "w2a", "w2b"}, "LOKR": set()}
_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>hada|lokr)_(?P<part>w1_a|w1_b|w2_a|w2_b|w1|w2|t1|t2)(\.[^.]+)?")


def config(values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
    """Our config, of PEFT's names for these kinds."""
    return from_peft({**values, "peft_type": "LORA", "lora_alpha": values.get("alpha", 8), "lora_dropout": 0.0}, where)


def updates(kind: str, tensors: Mapping[str, Tensor], config: LoraConfig, where: Path) -> dict[str, Update]:
    """module -> its update. `tensors`: without PEFT's prefix."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["kind"] != KINDS[kind]:
            raise AdapterError(
                f"{where}: key '{key}' does not belong: peft_type is '{kind}', whose keys are <module>.{KINDS[kind]}_w1_a ..."
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
            raise AdapterError(f"{where}: '{module}' has {', '.join(found)}; {kind} needs {', '.join(lacking) or 'no ' + extra[0]}")
        alpha = config.alpha_of(module)
        made[module] = Hadamard(alpha=alpha, **found) if kind == "LOHA" else _kronecker(module, found, config)  # type: ignore[arg-type]
    return made


_LOKR = ("w1", "w1a", "w1b", "w2", "w2a", "w2b", "t2")


def _kronecker(module: str, found: dict[str, Tensor], config: LoraConfig) -> Kronecker:
    alpha = config.alpha_of(module)
    if "w1" in found and "w2" in found:
        found = found | {"w1": folded(found["w1"], alpha / config.rank_of(module))}
    return Kronecker(alpha=alpha, **found)  # type: ignore[arg-type]
