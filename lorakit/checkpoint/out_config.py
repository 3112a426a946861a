"""A merged part's config and the index of its shards, where they differ from the base's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..io.atomic import write_text
from .base import CONFIG, Base
from .long_context import with_scaling
from .merge_plan import Plan
from .parts import Part
from .tied_weights import untied
from .vocabulary import with_vocabulary


def write_config(
    part: Part, plan: Plan, folder: Path, dtype: torch.dtype | None, adapters: Sequence[Adapter] = ()
) -> None:
    """Write a part's config and index if they changed. `adapters`: those that are merged."""
    base = part.base
    config = untied(base.config, base.folder) if plan.untied else dict(base.config)
    if plan.grown is not None:
        config = with_vocabulary(config, *plan.grown)
    config = with_scaling(config, base.folder, adapters)
    quantization = new_quantization(part, plan)
    if quantization is not None:
        config = _with_quantization(config, quantization)
    if dtype is not None and config:
        # A pipeline's component may leave out its dtype, a transformers model never does.
        has_dtype = part.name or "torch_dtype" in config
        config = _with_dtype(config if has_dtype else {"dtype": "", **config}, str(dtype).removeprefix("torch."))
    if config != base.config:
        write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if base.index is not None:
        index = _index(base, plan, {e.file: part.file(e.file, dtype is not None) for e in plan.entries})
        write_text(folder / part.file(base.index_name, dtype is not None), json.dumps(index, indent=2) + "\n")


def _with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with another `quantization_config`, none if that is empty; also where a nested config has it."""
    made = {k: v for k, v in config.items() if k != "quantization_config"}
    text = made.get("text_config")
    if isinstance(text, dict):
        made["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return {**made, "quantization_config": dict(quantization)} if quantization else made


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config with its dtype changed, and the dtype of nested configs."""
    inner = {
        key: _with_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    return {**config, **inner, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}


def new_quantization(part: Part, plan: Plan) -> Mapping[str, Any] | None:
    """Return the `quantization_config` that OUT gets instead of the base's, empty for none; None if it keeps that."""
    if part.base.quantization is None:
        return None
    return {} if plan.requantize is None else plan.requantize.config


def _index(base: Base, plan: Plan, files: Mapping[str, str]) -> dict[str, Any]:
    assert base.index is not None
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(e.nbytes for e in plan.entries)
    if "total_parameters" in metadata and plan.dequantized:
        metadata["total_parameters"] = sum(math.prod(e.shape) for e in plan.entries)
    elif "total_parameters" in metadata:
        extra = [e for e in plan.entries if e.name not in base.tensors]
        metadata["total_parameters"] += sum(torch.Size(e.shape).numel() for e in extra)
    return {
        "metadata": metadata,
        "weight_map": dict(sorted((name, files[e.file]) for e in plan.entries for name in e.layout)),
    }
