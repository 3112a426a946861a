"""PEFT's folder: `adapter_config.json`, `adapter_model.safetensors` (or `.bin`), and ours beside them: `lorakit.json`.

    base_model.model.<module>.lora_A.weight, .lora_B.weight            linear [r, in], [out, r]; conv [r, in, *k], [out, r/g, 1...]
    base_model.model.<module>.lora_embedding_A, _B                     [r, vocab], [dim, r]
    base_model.model.<module>.base_layer.bias, <other>.bias            trained biases
    base_model.model.<module>.<parameter>                              modules saved whole

Packed projections and shared grouped convolutions are written as the plain update that they are (exactly: rank and alpha
grow together), and come back compact.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.factors import Factors
from ..config import LoraConfig
from ..errors import AdapterError
from ..ops.blocks import compact_packed, group_blocks, ungroup
from .files import parse_json, read_json, read_tensors, write_tensors, write_text
from .peft_config import checked, dumps, from_peft, to_peft

CONFIG, WEIGHTS, PICKLE, OURS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lorakit.json"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)")
_UNSUPPORTED = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "a bias on B",
    ".trainable_tokens_delta": "trained tokens",
    ".lora_E": "AdaLoRA",
}


def is_peft(path: Path) -> bool:
    """Whether a folder, or the folder of a file, is PEFT's."""
    return (_folder(path) / CONFIG).exists() and (path.is_dir() or path.name in (CONFIG, WEIGHTS, PICKLE))


def read(path: Path) -> Adapter:
    """Read PEFT's folder. Raises AdapterError naming the file and key at fault."""
    folder = _folder(path)
    if not (folder / CONFIG).exists():
        raise AdapterError(f"{folder} is no PEFT adapter: {CONFIG} is missing")
    config, transposed = from_peft(read_json(folder / CONFIG), folder / CONFIG)
    weights = folder / WEIGHTS if (folder / WEIGHTS).exists() else folder / PICKLE
    if not weights.exists():
        raise AdapterError(f"{folder} holds no weights: neither {WEIGHTS} nor {PICKLE} is there")
    tensors, header = read_tensors(weights)
    ours = read_json(folder / OURS) if (folder / OURS).exists() else parse_json(header.get("lorakit", "{}"), f"{weights} (its header)")
    config = checked(folder / OURS, lambda: config.replace(packed=ours.pop("packed", {})))
    packed = {module: tuple(parts) for module, parts in config.packed.items()}
    halves, saved = _sort(tensors, weights)
    factors = {
        module: _factors(module, kind, pair, config, transposed, packed.get(module), weights)
        for module, (kind, pair) in halves.items()
    }  # fmt: skip
    return Adapter(config, factors, saved, ours).check()


def write(adapter: Adapter, path: Path) -> Path:
    """Write PEFT's folder."""
    adapter.check()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, f in adapter.factors.items():
        A, B, alpha = _plain_pair(f)
        ranks[module], alphas[module] = A.shape[0], alpha
        infix, suffix = ("lora_embedding_", "") if f.kind == "embedding" else ("lora_", ".weight")
        tensors[f"{PREFIX}{module}.{infix}A{suffix}"] = A
        tensors[f"{PREFIX}{module}.{infix}B{suffix}"] = B
    for name, tensor in adapter.saved.items():
        module, _, last = name.rpartition(".")
        adapted_bias = last == "bias" and module in adapter.factors
        tensors[f"{PREFIX}{module}.base_layer.bias" if adapted_bias else PREFIX + name] = tensor
    transposed = any(f.transposed for f in adapter.factors.values())
    packed = {module: list(f.parts) for module, f in adapter.factors.items() if f.parts}
    ours = {**adapter.metadata, **({"packed": packed} if packed else {})}
    config = adapter.config.replace(save_modules=_save_modules(adapter))
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, tensors, {"format": "pt", "lorakit": json.dumps(ours, sort_keys=True)})
    write_text(path / CONFIG, dumps(to_peft(config, ranks, alphas, transposed)))
    write_text(path / OURS, json.dumps(ours, indent=2, sort_keys=True) + "\n")
    if (path / PICKLE).exists():
        (path / PICKLE).unlink()  # else a reader that prefers it would get the old weights
    return path


def _save_modules(adapter: Adapter) -> list[str]:
    """The config's, and what else holds weights saved whole (the other end of a tied weight), biases apart."""
    named = list(adapter.config.save_modules)
    for name in adapter.saved:
        module, _, last = name.rpartition(".")
        if last != "bias" and not any(f".{entry}." in f".{name}" for entry in named):
            named.append(module)
    return named


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _sort(tensors: dict[str, Tensor], where: Path) -> tuple[dict[str, tuple[str, dict[str, Tensor]]], dict[str, Tensor]]:
    """Keys into {module: (kind, {"A": .., "B": ..})} and whole weights."""
    halves: dict[str, tuple[str, dict[str, Tensor]]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for mark, what in _UNSUPPORTED.items():
            if mark in name:
                raise AdapterError(f"{where}: key '{key}': {what} is not supported")
        match = _FACTOR.fullmatch(name)
        if match:
            kind = "embedding" if match["embedding"] else "linear" if tensor.dim() <= 2 else "conv"
            pair = halves.setdefault(match["module"], (kind, {}))[1]
            half = match["linear"] or match["embedding"]
            if half in pair:
                raise AdapterError(f"{where}: key '{key}': a second {half} for '{match['module']}'")
            pair[half] = tensor
        elif name.endswith(".base_layer.bias"):
            saved[name.replace(".base_layer.", ".")] = tensor
        elif name.endswith(".base_layer.weight") or ".original_module." in name:
            continue  # frozen: PEFT writes the base's matrix beside a LoRA on embeddings, and with bias="all" a saved module's old bias
        elif ".lora_" in name:
            raise AdapterError(
                f"{where}: key '{key}' is not one that LoRA has\n  expected <module>.lora_A.weight, .lora_B.weight or .lora_embedding_A, _B"
            )
        else:
            saved[re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name)] = tensor
    for module, (_, pair) in halves.items():
        for half in "AB":
            if half not in pair:
                raise AdapterError(f"{where}: '{module}' has a lora_{'AB'.replace(half, '')} and no lora_{half}")
    return halves, saved


def _factors(
    module: str, kind: str, pair: dict[str, Tensor], config: LoraConfig, transposed: bool, parts: tuple[bool, ...] | None, where: Path
) -> Factors:
    A, B = pair["A"], pair["B"]
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != rank:
        raise AdapterError(f"{where}: '{module}' has A {list(A.shape)}; its config says rank {rank}, so [{rank}, ...] was expected")
    if kind != "conv":
        if parts is not None:
            if compact_packed(B, parts) is None:
                raise AdapterError(f"{where}: '{module}' is said to be packed as {list(parts)}, and its B does not have that form")
            alpha /= _growth(sum(parts), config.rslora)
        return Factors(A, B, alpha, kind, config.rslora, transposed and kind == "linear", parts=parts)  # type: ignore[arg-type]
    groups = A.shape[0] // B.shape[1] if B.shape[1] and A.shape[0] % B.shape[1] == 0 else 1
    compact = group_blocks(A, B, groups) if groups > 1 and A.shape[1] % groups == 0 else None
    if compact is not None:
        A, alpha = compact[0], alpha / _growth(groups, config.rslora)
    return Factors(A, B, alpha, "conv", config.rslora, groups=groups)


def _plain_pair(f: Factors) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) with the same ΔW in PEFT's own, blockless terms."""
    if f.parts:
        return f.A, f.B, f.alpha * _growth(sum(f.parts), f.rslora)
    if f.groups > 1 and f.A.shape[0] == f.B.shape[1]:
        return ungroup(f.A, f.groups), f.B, f.alpha * _growth(f.groups, f.rslora)
    return f.A, f.B, f.alpha


def _growth(blocks: int, rslora: bool) -> float:
    """What alpha is multiplied by so that the scale stays when the rank grows `blocks` times."""
    return math.sqrt(blocks) if rslora else blocks
