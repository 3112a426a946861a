"""The keys of PEFT's tensors: which module and which half of its update a tensor is, and which are saved weights."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..adapter.lora import Kind
from ..errors import AdapterError

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?")
_BIAS = re.compile(r"(?P<module>.+?)\.lora_B(?:\.[^.]+)?\.bias")  # PEFT's lora_bias: y += s · (B A x + bias)
_UNSUPPORTED = {".lora_E": "AdaLoRA"}


def sort(
    tensors: dict[str, Tensor], where: Path, dora: bool, biased: bool = False
) -> tuple[dict[str, tuple[Kind, dict[str, Tensor]]], dict[str, Tensor]]:
    """Sort the keys into {module: (kind, {"A": .., "B": .., "magnitude": ..})} and saved weights. The kind follows from
    the key and the axes of A. AdapterError for unknown or missing keys.
    """
    halves: dict[str, tuple[Kind, dict[str, Tensor]]] = {}
    saved: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for mark, what in _UNSUPPORTED.items():
            if mark in name:
                raise AdapterError(f"{where}: key '{key}': {what} is not supported")
        match = _FACTOR.fullmatch(name)
        if match:
            half = match["linear"] or match["embedding"]
            kind: Kind = "embedding" if match["embedding"] else "linear" if tensor.dim() <= 2 else "conv"
            before, pair = halves.get(match["module"], (kind, {}))
            halves[match["module"]] = (kind if half == "A" else before, pair)
            if half in pair:
                raise AdapterError(f"{where}: key '{key}': a second {half} for '{match['module']}'")
            pair[half] = tensor
        elif found := _BIAS.fullmatch(name):
            if not biased:
                raise AdapterError(
                    f"{where}: key '{key}': a bias on B is not supported unless {CONFIG} says lora_bias: true"
                )
            biases[found["module"]] = tensor
        elif found := _MAGNITUDE.fullmatch(name):
            if not dora:
                raise AdapterError(
                    f"{where}: key '{key}' is a DoRA's magnitude, and {CONFIG} does not say use_dora: true"
                )
            magnitudes[found["module"]] = tensor
        elif name.endswith(".base_layer.bias"):
            saved[name.replace(".base_layer.", ".")] = tensor
        elif name.endswith(".base_layer.weight") or ".original_module." in name:
            # frozen: PEFT writes the base's matrix beside a LoRA on embeddings, and with bias="all" a saved module's
            # old bias
            continue
        elif ".lora_" in name:
            raise AdapterError(
                f"{where}: key '{key}' is not one that LoRA has\n"
                "  expected <module>.lora_A.weight, .lora_B.weight or .lora_embedding_A, _B"
            )
        else:
            saved[re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name)] = tensor
    for module, (_, pair) in halves.items():
        for half in "AB":
            if half not in pair:
                raise AdapterError(f"{where}: '{module}' has a lora_{'AB'.replace(half, '')} and no lora_{half}")
        if dora and module not in magnitudes:
            raise AdapterError(f"{where}: {CONFIG} says use_dora: true, and '{module}' has no lora_magnitude_vector")
    for module, magnitude in magnitudes.items():
        if module not in halves:
            raise AdapterError(f"{where}: '{module}' has a lora_magnitude_vector and no lora_A")
        halves[module][1]["magnitude"] = magnitude
    for module, bias in biases.items():
        if module not in halves:
            raise AdapterError(f"{where}: '{module}' has a lora_B.bias and no lora_A")
        halves[module][1]["bias"] = bias
    lacking = [module for module in halves if module not in biases] if biased else []
    if lacking:
        raise AdapterError(
            f"{where}: {CONFIG} says lora_bias: true, and '{lacking[0]}' has no lora_B.bias\n"
            "  a bias on B is not supported for some modules alone"
        )
    return halves, saved
