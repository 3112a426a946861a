"""Trained tokens in PEFT's folder: `trainable_token_indices` beside a LoRA, or an adapter of type TRAINABLE_TOKENS.

    <module>.token_adapter.trainable_tokens_delta    [n, dim]: the rows themselves, in the order of the indices
    <module>.trainable_tokens_delta                  the same, in an adapter of type TRAINABLE_TOKENS

In adapter_config.json, a list of indices is for the model's input embedding, {module ending: indices} for any module.
Of tied embeddings PEFT writes the input embedding only, and so does lorakit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..config import LoraConfig
from ..errors import AdapterError
from ..module_names import ends_with

KIND = "TRAINABLE_TOKENS"
_ENDINGS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")


def as_lora(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a TRAINABLE_TOKENS adapter as those of a LoRA with trained tokens; others unchanged."""
    if values.get("peft_type") != KIND:
        return values
    targets = values.get("target_modules") or ["embed_tokens"]
    shared = {name: values[name] for name in ("base_model_name_or_path", "revision", "task_type") if name in values}
    return shared | {
        "peft_type": "LORA",
        "target_modules": [targets] if isinstance(targets, str) else targets,
        "trainable_token_indices": values.get("token_indices"),
    }


def resolved(config: LoraConfig, tokens: Mapping[str, Tokens]) -> LoraConfig:
    """Return the config with the trained tokens under the modules' full names."""
    return config.replace(trainable_tokens={m: list(u.ids) for m, u in tokens.items()})


def without(adapter: Adapter) -> Adapter:
    """Return the adapter without its trained tokens."""
    return replace(adapter, updates={m: u for m, u in adapter.updates.items() if not isinstance(u, Tokens)})


def take(tensors: dict[str, Tensor], values: Mapping[str, Any], prefix: str, where: Path) -> dict[str, Tokens]:
    """Remove the trained tokens from a file's tensors. Returns them by module.

    `values`: of adapter_config.json. Raises AdapterError, naming the key, where indices and rows do not fit.
    """
    indices = values.get("trainable_token_indices")
    found: dict[str, Tokens] = {}
    for key in [key for key in tensors if key.endswith(_ENDINGS[1])]:
        rows = tensors.pop(key)
        module = key.removeprefix(prefix)
        module = next(module.removesuffix(ending) for ending in _ENDINGS if module.endswith(ending))
        ids = _indices(indices, module, key, where)
        if rows.dim() != 2 or len(rows) != len(ids):
            raise AdapterError(
                f"{where}: key '{key}' has shape {list(rows.shape)}, and its config names {len(ids)} tokens; expected "
                f"[{len(ids)}, dim]"
            )
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        found[module] = Tokens(tuple(ids[i] for i in order), rows[torch.tensor(order, dtype=torch.long)])
    if indices and not found:
        raise AdapterError(
            f"{where}: its config has trainable_token_indices, and no key ends in {_ENDINGS[1]}: their rows are missing"
        )
    return found


def _indices(indices: Any, module: str, key: str, where: Path) -> list[int]:
    mine = indices
    if isinstance(indices, Mapping):
        mine = next((ids for ending, ids in indices.items() if ends_with(module, str(ending))), None)
    if not isinstance(mine, list) or not mine or not all(type(i) is int and i >= 0 for i in mine):
        raise AdapterError(
            f"{where}: key '{key}' is of trained tokens, and adapter_config.json does not name their indices "
            f"(trainable_token_indices is {indices!r})"
        )
    if len(set(mine)) < len(mine):
        raise AdapterError(f"{where}: trainable_token_indices names a token twice for '{module}'")
    return mine


def tensors_of(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    """Return the trained tokens by PEFT's keys."""
    ending = _ENDINGS[0] if adapter.factors else _ENDINGS[1]
    return {f"{prefix}{m}{ending}": u.weight for m, u in _tokens(adapter).items()}


def to_peft(values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Add the trained tokens to the fields of adapter_config.json; without any, the fields are returned unchanged."""
    tokens = _tokens(adapter)
    if not tokens:
        return values
    if adapter.factors:
        return values | {"trainable_token_indices": {m: list(u.ids) for m, u in tokens.items()}}
    kept = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type")
    ids = next(iter(tokens.values())).ids
    own = {"peft_type": KIND, "token_indices": list(ids), "target_modules": sorted(tokens), "init_weights": True}
    return {name: values[name] for name in kept} | own


def losses(adapter: Adapter) -> list[str]:
    """Return a line for tokens that PEFT's folder cannot hold."""
    tokens = _tokens(adapter)
    if tokens and not adapter.factors:
        if len({u.ids for u in tokens.values()}) > 1:
            return ["trained tokens that differ by module, in an adapter with nothing else"]
        if adapter.saved:
            return [f"saved weights ({len(adapter.saved)}) beside trained tokens alone"]
    return []


def _tokens(adapter: Adapter) -> dict[str, Tokens]:
    return {m: u for m, u in adapter.updates.items() if isinstance(u, Tokens)}
