"""Weights of experts in PEFT's folder: `target_parameters`, LoRA on parameters that are no module's `weight`.

    <experts>.lora_A.weight, .lora_B.weight                          [E·r, in], [out, r·E]: of the outermost wrapper
    <experts>.base_layer.lora_A.weight, .base_layer.lora_B.weight    of the one within

PEFT puts one wrapper around the experts for each parameter, in the order in which the module registers them, so that
the last one is the outermost: gate_up_proj (or up_proj) is within, down_proj is outside. The keys do not name the
parameter. The rows of A are ordered by expert and then by rank, the columns of B by rank and then by expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.experts import ExpertFactors
from ..config import PRESETS, LoraConfig
from ..errors import AdapterError
from ..module_names import ends_with, matches

OUTERMOST = "down_proj"  # of two parameters, the one that transformers' experts register last
_TRANSPOSED = "transposed_experts"  # in lorakit.json: which weights are [E, in, out]
_DROPOUT = "dropout"  # in lorakit.json: PEFT takes none beside target_parameters
_KEY = re.compile(r"(?P<holder>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")


def as_targets(values: Mapping[str, Any], where: Path | str) -> Mapping[str, Any]:
    """Return the fields with `target_parameters` among `target_modules`, as lorakit names them; a pattern for modules
    is resolved once their names are known (`resolved`). Raises AdapterError if they are no names.
    """
    named = _named(values, where)
    if not named:
        return values
    targets = values.get("target_modules") or []
    both = targets if isinstance(targets, str) else sorted({*targets, *named})
    return {**values, "target_modules": both}


def _named(values: Mapping[str, Any], where: Path | str) -> list[str]:
    """The entries that are no module's `weight`: PEFT treats those as it treats the module."""
    entries = values.get("target_parameters") or []
    if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
        raise AdapterError(f"{where}: target_parameters is {entries!r}; expected a list of parameters' names")
    return [e for e in entries if e.rpartition(".")[2] != "weight"]


def take(
    tensors: dict[str, Tensor],
    values: Mapping[str, Any],
    config: LoraConfig,
    ours: Mapping[str, Any],
    prefix: str,
    where: Path,
) -> dict[str, ExpertFactors]:
    """Remove the factors of parameters from a file's tensors. Returns them by the parameter's full name.

    values: of adapter_config.json; ours: of lorakit.json. Raises AdapterError, naming the key, for factors whose
    parameter is not known, or whose shapes do not fit.
    """
    entries = _named(values, where)
    if not entries:
        return {}
    modules = values.get("target_modules") or []
    wrappers: dict[str, dict[int, dict[str, str]]] = {}  # holder -> how far within -> half -> key
    for key in tensors:
        found = _KEY.fullmatch(key.removeprefix(prefix))
        if found is None:
            continue
        holder, depth = found["holder"], found["inner"].count(".base_layer")
        if depth or (_parameters(holder, entries) and not matches(holder, modules)):
            wrappers.setdefault(holder, {}).setdefault(depth, {})[found["half"]] = key
    result: dict[str, ExpertFactors] = {}
    transposed = ours.get(_TRANSPOSED)
    for holder, by_depth in wrappers.items():
        parameters = _in_order(holder, _parameters(holder, entries), where)
        if sorted(by_depth) != list(range(len(parameters))):
            raise AdapterError(
                f"{where}: '{holder}' has {len(by_depth)} pairs of factors for its parameters, and target_parameters "
                f"names {parameters} of it"
            )
        for depth, parameter in enumerate(reversed(parameters)):
            name = f"{holder}.{parameter}"
            keys = by_depth[depth]
            missing = [half for half in "AB" if half not in keys]
            if missing:
                raise AdapterError(f"{where}: '{name}' has no lora_{missing[0]}")
            A, B = tensors.pop(keys["A"]), tensors.pop(keys["B"])
            across = isinstance(transposed, list) and name in transposed
            result[name] = _factors(name, A, B, config, across, where)
    idle = [e for e in entries if not any(ends_with(name, e) for name in result)]
    if idle:
        raise AdapterError(f"{where}: target_parameters names '{idle[0]}', and no key has its factors")
    return result


def _parameters(holder: str, entries: Collection[str]) -> list[str]:
    """The parameters of a module that the entries name (PEFT's rule: by ending)."""
    return sorted({last for e in entries if ends_with(f"{holder}.{(last := e.rpartition('.')[2])}", e)})


def _in_order(holder: str, parameters: list[str], where: Path) -> list[str]:
    """The parameters in the order in which the module registers them."""
    if len(parameters) < 2:
        return parameters
    if len(parameters) == 2 and OUTERMOST in parameters:
        return sorted(parameters, key=lambda parameter: parameter == OUTERMOST)
    raise AdapterError(
        f"{where}: target_parameters names {parameters} of '{holder}', and the file does not say which factors are "
        "whose\n"
        f"  expected one parameter, or two with {OUTERMOST} among them"
    )


def _factors(name: str, A: Tensor, B: Tensor, config: LoraConfig, transposed: bool, where: Path) -> ExpertFactors:
    rank = config.rank_of(name)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterError(
            f"{where}: '{name}' has A {list(A.shape)} and B {list(B.shape)}; its config says rank {rank}, so "
            f"[experts x {rank}, in] and [out, {rank} x experts] were expected"
        )
    experts = A.shape[0] // rank
    own_A = A.reshape(experts, rank, -1)
    own_B = B.reshape(-1, rank, experts).permute(2, 0, 1).contiguous()
    return ExpertFactors(own_A, own_B, config.alpha_of(name), config.rslora, transposed)


def resolved(config: LoraConfig, experts: Mapping[str, ExpertFactors], ours: dict[str, Any]) -> LoraConfig:
    """Return the config with what lorakit.json notes of it, and take that out of `ours`."""
    ours.pop(_TRANSPOSED, None)
    dropout = ours.pop(_DROPOUT, None) if experts else None
    if isinstance(dropout, int | float) and 0 <= dropout < 1:
        config = config.replace(dropout=float(dropout))
    if (
        experts and isinstance(config.targets, str) and config.targets not in PRESETS
    ):  # a pattern for modules, which names no parameter
        return config.replace(targets=f"({config.targets})|{'|'.join(map(re.escape, experts))}")
    return config


# Writing


def experts_of(adapter: Adapter) -> dict[str, ExpertFactors]:
    """Return the adapter's updates of experts."""
    return {m: u for m, u in adapter.updates.items() if isinstance(u, ExpertFactors)}


def tensors_of(experts: Mapping[str, ExpertFactors], prefix: str) -> dict[str, Tensor]:
    """Return their factors by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, own in experts.items():
        holder, _, parameter = name.rpartition(".")
        beside = [n for n in experts if n.rpartition(".")[0] == holder and n != name]
        inner = ".base_layer" if beside and parameter != OUTERMOST else ""
        tensors[f"{prefix}{holder}{inner}.lora_A.weight"] = own.A.flatten(0, 1)
        tensors[f"{prefix}{holder}{inner}.lora_B.weight"] = own.B.permute(1, 2, 0).flatten(1).contiguous()
    return tensors


def entries(config: LoraConfig, parameters: Collection[str]) -> list[str]:
    """Return PEFT's `target_parameters`: endings such as "experts.down_proj" where the config's targets are endings
    that match these parameters; their full names otherwise.
    """
    targets = config.targets
    narrowed = config.exclude or config.layers or isinstance(targets, str)
    if narrowed or not all(any(ends_with(p, t) and "." not in t for t in targets) for p in parameters):
        return sorted(parameters)
    return sorted({".".join(p.split(".")[-2:]) for p in parameters})


def noted(adapter: Adapter) -> dict[str, Any]:
    """Return what lorakit.json says of them that PEFT's config has no field for."""
    experts = experts_of(adapter)
    transposed = sorted(name for name, own in experts.items() if own.transposed)
    dropout = adapter.config.dropout
    notes: dict[str, Any] = {_TRANSPOSED: transposed} if transposed else {}
    return notes | ({_DROPOUT: dropout} if experts and dropout else {})


def losses(adapter: Adapter) -> list[str]:
    """Say what PEFT's folder cannot hold of them, one line each."""
    experts = experts_of(adapter)
    if not experts:
        return []
    lost = []
    dora = [m for m, u in adapter.updates.items() if u.variant == "dora"]
    if dora:
        lost.append(f"DoRA's magnitude of {dora[0]} beside factors of experts: PEFT takes no DoRA with parameters")
    for name in experts:
        holder = name.rpartition(".")[0]
        several = [n.rpartition(".")[2] for n in experts if n.rpartition(".")[0] == holder]
        if len(several) > 2 or (len(several) == 2 and OUTERMOST not in several):
            lost.append(f"'{name}': PEFT's keys do not tell {sorted(several)} of one module from each other")
            break
    return lost
