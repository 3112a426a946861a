"""PEFT's VeRA folder, read and written.

    base_model.model.<module>.vera_lambda_b [out], .vera_lambda_d [r]
    base_model.vera_A [r, largest in], base_model.vera_B [largest out, r]     unless save_projection is false
    base_model.model.<module>.base_layer.bias, <other>.<parameter>            trained biases, modules_to_save

Without the matrices they follow from `projection_prng_key` and the largest sizes of the base. Only the model has the
modules' numbers of inputs; lorakit.json has those of an adapter that lorakit wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..adapter.vera import Projection, Vera
from ..config import LoraConfig
from ..errors import AdapterError, listing
from .peft_config import from_peft
from .peft_kind import PeftKind, common

_KEY = re.compile(r"(?P<module>.+)\.vera_lambda_(?P<half>[bd])(\.[^.]+)?")
_SHARED = re.compile(r"base_model\.vera_(?P<half>[AB])(\.[^.]+)?")
_ALPHA = LoraConfig.model_fields["alpha"].default  # VeRA has none: as in the config of a new one
_INPUTS = "vera_inputs"  # in lorakit.json: module -> its number of inputs


class _Vera(PeftKind):
    peft_type, variant = "VERA", "vera"

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        bias = "lora_only" if values.get("bias") == "vera_only" else values.get("bias")
        fields = {"peft_type": "LORA", "lora_dropout": values.get("vera_dropout"), "bias": bias}
        ours, transposed = from_peft({**values, **fields, "r": values.get("r") or 256, "lora_alpha": _ALPHA}, where)
        seed, start = values.get("projection_prng_key", 0), values.get("d_initial", 0.1)
        if not isinstance(seed, int) or seed < 0 or not isinstance(start, int | float):
            raise AdapterError(
                f"{where}: projection_prng_key is {seed!r} and d_initial {start!r}; expected an integer from 0, and a "
                "number"
            )
        return ours.replace(variant=self.variant, vera_seed=seed, vera_start=start), transposed

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        found, shared, saved = _sorted(tensors, where)
        lacking = [f"vera_{half}" for half in "AB" if half not in shared]
        if len(lacking) == 1 or (lacking and values.get("save_projection", True)):
            raise AdapterError(
                f"{where}: key 'base_model.{lacking[0]}' is missing, and adapter_config.json says that the random "
                "matrices are in the file (save_projection)"
            )
        projection = Projection(config.vera_seed, shared.get("A"), shared.get("B"))
        inputs, transposed = ours.pop(_INPUTS, {}), bool(values.get("fan_in_fan_out"))
        made: dict[str, Update] = {}
        for module, halves in found.items():
            missing = [half for half in "bd" if half not in halves]
            if missing:
                raise AdapterError(f"{where}: '{module}' has no vera_lambda_{missing[0]}; VERA has _b and _d")
            size = inputs.get(module) if isinstance(inputs, Mapping) else None
            size = size if type(size) is int and size > 0 else None
            made[module] = Vera(halves["d"], halves["b"], projection, size, transposed)
        return made, saved

    def losses(self, adapter: Adapter) -> list[str]:
        veras = {m: u for m, u in adapter.updates.items() if isinstance(u, Vera)}
        first = next(iter(veras.values()))
        other = [m for m, u in veras.items() if not _same(u.projection, first.projection)]
        lost = []
        if other:
            lost.append(f"other random matrices of {listing(other, 2)}: in PEFT's VeRA all modules share them")
        if len({u.transposed for u in veras.values()}) > 1:
            lost.append("linears stored as [in, out] beside others: PEFT's VeRA has one fan_in_fan_out for all")
        return lost

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        veras = {m: u for m, u in adapter.updates.items() if isinstance(u, Vera)}
        tensors = {f"{prefix}{m}.vera_lambda_{half}": t for m, u in veras.items() for half, t in u.tensors().items()}
        shared = next(iter(veras.values())).projection
        if shared.A is not None and shared.B is not None:
            tensors |= {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}
        ranks = {m: u.rank for m, u in veras.items()}
        return tensors, ranks, {m: adapter.config.alpha_of(m) for m in veras}

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        first = next(u for u in adapter.updates.values() if isinstance(u, Vera))
        return common(values) | {
            "bias": "vera_only" if values["bias"] == "lora_only" else values["bias"],
            "d_initial": adapter.config.vera_start,
            "fan_in_fan_out": first.transposed,
            "init_weights": True,
            "peft_type": self.peft_type,
            "projection_prng_key": first.projection.seed,
            "save_projection": first.projection.A is not None,
            "vera_dropout": values["lora_dropout"],
        }

    def ours(self, adapter: Adapter) -> dict[str, Any]:
        inputs = {m: u.size_in for m, u in adapter.updates.items() if isinstance(u, Vera) and u.size_in is not None}
        return {_INPUTS: inputs} if inputs else {}


KIND = _Vera()


def _sorted(
    tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Sort into (module -> its vectors, the shared matrices, saved weights). AdapterError for another method's key."""
    found: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            halves = found.setdefault(match["module"], {})
            if match["half"] in halves:
                raise AdapterError(f"{where}: key '{key}': a second vector for '{match['module']}'")
            halves[match["half"]] = tensor
        elif match := _SHARED.fullmatch(key):
            shared[match["half"]] = tensor
        elif ".lora_" in key or ".vera_" in key:
            raise AdapterError(
                f"{where}: key '{key}' does not belong: peft_type is 'VERA', whose keys are <module>.vera_lambda_b ..."
            )
        else:
            saved[key.replace(".base_layer.", ".")] = tensor
    return found, shared, saved


def _same(a: Projection, b: Projection) -> bool:
    if a is b:
        return True
    if a.A is None or a.B is None or b.A is None or b.B is None:
        return a.A is None and b.A is None and a.seed == b.seed
    return torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
