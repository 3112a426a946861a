"""`nn.MultiheadAttention` in PEFT's folder: the factors of in_proj_weight and of out_proj's weight.

    <attention>.lora_A.weight [r, dim], .lora_B.weight [3·dim, r]            in_proj_weight
    <attention>.base_layer.out_proj.lora_A.weight, .lora_B.weight            out_proj

PEFT adapts both under the attention's name, which alone is in target_modules, with one rank and one alpha. Where ours
differ (an adapter of some of q, k and v), zeros make up the rank and the scale goes into B.

PEFT up to 0.21 applies the change of out_proj twice, live and when it merges: it adds ΔW to the weight, and then merges
out_proj's own layer (https://github.com/huggingface/peft/pull/3774, not released). The effect is what counts. B of
out_proj is doubled when such a file is read, and halved when one is written, which is exact; adapter_config.json says
for which version (`peft_version`, which PEFT writes too). In a file of a later version B is what it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..adapter.lora import Factors
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError, listing
from .scale import folded

_INSIDE = ".base_layer.out_proj"
_TWICE_UP_TO = (0, 21)  # measured with 0.21.2: the logits agree with twice s · B A to 5e-7, and with once to 0.7
_VERSION = "0.21.2"
T = TypeVar("T")


def renamed(found: Mapping[str, T], where: Path) -> dict[str, T]:
    """Return what a file has by module, with out_proj under its own name: attn.base_layer.out_proj -> attn.out_proj.

    Raises AdapterError for an out_proj whose attention is not in the file.
    """
    for module in found:
        if module.endswith(_INSIDE) and module.removesuffix(_INSIDE) not in found:
            raise AdapterError(
                f"{where}: '{module}' is the output of an attention, which has no factors itself: the file is not "
                "complete"
            )
    return {m.replace(_INSIDE, ".out_proj") if m.endswith(_INSIDE) else m: value for m, value in found.items()}


def attention_of(module: str, modules: Mapping[str, object]) -> str | None:
    """Return the attention that this module is the out_proj of; None for other modules. `modules`: all adapted ones."""
    holder, _, last = module.rpartition(".")
    return holder if last == "out_proj" and holder in modules else None


def key_of(module: str, modules: Mapping[str, object]) -> str:
    """Return the module's name in PEFT's keys."""
    holder = attention_of(module, modules)
    return module if holder is None else holder + _INSIDE


def with_targets(config: LoraConfig, factors: Mapping[str, Factors], modules: Collection[str]) -> LoraConfig:
    """Return the config with these modules as targets if any output of an attention is adapted, which must not be one.

    `modules`: those that PEFT's config is to name.
    """
    inside = any(attention_of(module, factors) is not None for module in factors)
    return config.replace(targets=sorted(modules), exclude=None, layers=None, layers_pattern=[]) if inside else config


def as_applied(updates: Mapping[str, Factors], values: Mapping[str, Any]) -> dict[str, Factors]:
    """Return a file's factors with the ΔW that the PEFT that wrote it applies. `values`: of adapter_config.json."""
    version = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or "0.0"))
    if version is not None and (int(version[1]), int(version[2])) > _TWICE_UP_TO:
        return dict(updates)
    return {m: f if attention_of(m, updates) is None else replace(f, B=folded(f.B, 2.0)) for m, f in updates.items()}


def fields(factors: Mapping[str, Factors]) -> dict[str, str]:
    """Return the fields of adapter_config.json that say how the factors are written."""
    return {"peft_version": _VERSION} if any(attention_of(m, factors) is not None for m in factors) else {}


def note(factors: Mapping[str, Factors]) -> str | None:
    """Say for which PEFT the outputs of attentions are written; None without any."""
    inside = [module for module in factors if attention_of(module, factors) is not None]
    if not inside:
        return None
    return (
        f"the factors of {listing(inside, 2)} are written halved, since PEFT {_VERSION} applies them twice\n"
        "  lorakit reads them back as they are; a PEFT in which that is mended (pull request 3774) would apply half"
    )


def losses(updates: Mapping[str, Update]) -> list[str]:
    """Return what PEFT's folder cannot hold of attentions, one line each."""
    inside = {m: holder for m in updates if (holder := attention_of(m, updates)) is not None}
    dora = [m for m in (*inside, *inside.values()) if updates[m].variant == "dora"]
    return [f"DoRA's magnitude of {listing(dora, 2)}: PEFT takes none for an nn.MultiheadAttention"] if dora else []


def as_written(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the factors as PEFT's files have them: of one rank and one scale for each attention and its out_proj, and
    the latter's halved, as PEFT applies it twice.
    """
    changed = dict(factors)
    for module in factors:
        holder = attention_of(module, factors)
        if holder is None:
            continue
        own, other = changed[holder], changed[module]
        rank = max(own.A.shape[0], other.A.shape[0])
        changed[holder] = _of(own, rank, own.scale)
        written = _of(other, rank, own.scale)
        changed[module] = replace(written, B=folded(written.B, 0.5))
    return changed


def _of(f: Factors, rank: int, scale: float) -> Factors:
    """Return factors of this rank, or the sum of the parts' ranks, and this scale, with the same ΔW."""
    alpha = scale * (math.sqrt(rank) if f.rslora else rank)
    if f.A.shape[0] == rank and math.isclose(f.scale, scale, rel_tol=1e-12):
        return f if f.parts is None else replace(f, parts=None, alpha=alpha)
    missing = rank - f.A.shape[0]
    A, B = nn.functional.pad(f.A, (0, 0, 0, missing)), nn.functional.pad(f.B, (0, missing))
    return replace(f, A=A, B=folded(B, f.scale / scale), alpha=alpha, parts=None)
