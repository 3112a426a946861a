"""PEFT's AdaLoRA folder, written from any LoRA of linears: to go on in PEFT's AdaLoraModel. Read as `peft` reads it.

    base_model.model.<module>.lora_A [r, in], .lora_B [out, r], .lora_E [r, 1]      ΔW = alpha / (init_r + 1e-5) · B E A

E gets the norms of A's rows and B's columns, which are 1 then, as AdaLoRA's penalty wants them. Plain LoRA ("peft") is
what other programs load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..errors import AdapterError, listing
from ..io.atomic import write_text
from ..io.tensors import write_tensors
from . import peft
from .format import Format, ReadOptions, WriteOptions
from .inside import OURS
from .peft_adalora import EPSILON, KIND
from .peft_config import dumps, to_peft
from .peft_keys import CONFIG, PREFIX
from .peft_shards import PICKLE, WEIGHTS
from .scale import clean, commonest
from .unheld import embeddings, other_kinds


def losses(adapter: Adapter) -> list[str]:
    """What PEFT's AdaLoRA folder cannot hold of this adapter, one line each."""
    lost = other_kinds(adapter, "lora") + embeddings(adapter)
    others = [m for m, f in adapter.factors.items() if f.kind != "linear"]
    if others:
        lost.append(f"{len(others)} convolutions or embeddings ({listing(others, 2)}): here AdaLoRA is of linears")
    biases = [n for n in adapter.saved if n.endswith(".bias") and n.rpartition(".")[0] in adapter.factors]
    if biases:
        lost.append(f"{len(biases)} trained biases of adapted modules ({listing(biases, 2)})")
    return lost


def write(adapter: Adapter, path: Path) -> Path:
    """Write the folder and return it. AdapterError, and nothing written, if it cannot hold all of the adapter."""
    adapter.check()
    if lost := losses(adapter):
        raise AdapterError(f"{path}: PEFT's AdaLoRA format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    factors = adapter.factors
    first = max(f.A.shape[0] for f in factors.values())
    alpha = clean(commonest(f.scale for f in factors.values()) * (first + EPSILON))
    tensors: dict[str, Tensor] = {}
    kept: dict[str, list[bool]] = {}
    for module, f in factors.items():
        A, E, B = _taken_apart(f, alpha / (first + EPSILON))
        rank = A.shape[0]
        tensors |= {f"{PREFIX}{module}.lora_{name}": t for name, t in zip("AEB", (A, E, B), strict=True)}
        kept[f"{module}.lora_E"] = [True] * rank + [False] * (first - rank)
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.saved.items()}
    ranks = dict.fromkeys(factors, first)
    transposed = any(f.transposed for f in factors.values())
    values = to_peft(
        adapter.config.replace(rank_pattern={}, alpha_pattern={}), ranks, dict.fromkeys(factors, alpha), transposed
    )
    values |= _adalora(first, alpha, kept if any(not all(row) for row in kept.values()) else None)
    write_tensors(path / WEIGHTS, tensors, {"format": "pt", "lorakit": json.dumps(adapter.metadata, sort_keys=True)})
    write_text(path / CONFIG, dumps(values))
    write_text(path / OURS, json.dumps(dict(adapter.metadata), indent=2, sort_keys=True) + "\n")
    return path


def _taken_apart(f: Factors, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A with rows and B with columns of norm 1, and E [r, 1] with the rest. A zero row or column stays."""
    A, B = f.A.double(), f.B.double()
    of_A, of_B = A.norm(dim=1, keepdim=True), B.norm(dim=0, keepdim=True)
    E = of_A * of_B.T * (f.scale / scale)
    A, B = A / of_A.where(of_A > 0, 1.0), B / of_B.where(of_B > 0, 1.0)
    dtype = torch.promote_types(f.A.dtype, torch.float32)  # 16 bits would round each of the three
    return A.to(dtype), E.to(dtype), B.to(dtype)


def _adalora(first: int, alpha: float, kept: dict[str, list[bool]] | None) -> dict[str, Any]:
    """The fields that AdaLoraConfig has besides a LoraConfig's. Its schedule is that of a run that has ended."""
    return {
        "peft_type": KIND,
        "r": 8,  # PEFT's default, which AdaLoRA does not use
        "init_r": first,
        "target_r": first,
        "lora_alpha": alpha,
        "alpha_pattern": {},
        "rank_pattern": kept,
        "use_rslora": False,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": 1,
    }


class AdaLora(Format):
    """PEFT's AdaLoRA folder, behind the interface of all formats. A folder of it is read as PEFT's."""

    name = "adalora"
    is_folder = True
    files = (WEIGHTS, PICKLE)

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return False

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return peft.read(path)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path)

    def stale(self, path: Path) -> list[str]:
        return [PICKLE]


FORMAT = AdaLora()
