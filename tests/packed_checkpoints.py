"""GPTQ and AWQ checkpoints of tiny models, and what their weights are by the equations, in Python's own integers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import quantized
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.ops.quantized import awq, gptq

GROUP = 32


def gptq_config(**changed: Any) -> dict[str, Any]:
    """`quantization_config` as gptqmodel writes it."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    } | changed


def awq_config(**changed: Any) -> dict[str, Any]:
    """`quantization_config` as AutoAWQ writes it."""
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"} | changed


def act_order(size_in: int, group: int = GROUP, seed: int = 0) -> Tensor:
    """`g_idx` of activation order: groups of any inputs."""
    order = torch.randperm(size_in, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.empty(size_in, dtype=torch.int32)
    g_idx[order] = (torch.arange(size_in) // group).int()
    return g_idx


def packed(W: Tensor, how: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weight [out, in]."""
    if how["quant_method"] == "awq":
        return awq.quantized(W, awq.Settings.of(how))
    return gptq.quantized(W, gptq.Settings.of(how), act_order(W.shape[1]) if how["desc_act"] else None)


def save(folder: Path, how: dict[str, Any], model: nn.Module | None = None) -> tuple[Path, nn.Module]:
    """Save a checkpoint of a model whose linears but the head are packed, and the others in fp16. Returns its folder,
    and the model with the dequantized weights, in float32.
    """
    model = quantized.llama() if model is None else model
    head = model.get_output_embeddings()
    for parameter in model.parameters():
        parameter.data = parameter.half().float()
    copy.deepcopy(model).half().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            made = packed(module.weight.float(), how)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{last}": tensor for last, tensor in made.items()}
            with torch.no_grad():
                module.weight.copy_(by_hand(made, how))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}, indent=2))
    return folder, model


def by_hand(tensors: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
    """What a packed weight [out, in] is: each code picked out of its bits, in float64."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, bits = tensors["scales"].double(), how["bits"]
    size_out = scales.shape[1]
    if how["quant_method"] == "awq":
        at = [0, 4, 1, 5, 2, 6, 3, 7]  # the place of output 0, 1, ... in a word
        size_in = len(qweight)
        q = [[qweight[i][o // 8] >> 4 * at[o % 8] & 15 for i in range(size_in)] for o in range(size_out)]
        z = [[row[o // 8] >> 4 * at[o % 8] & 15 for row in qzeros] for o in range(size_out)]
        group = torch.arange(size_in) // (size_in if how["group_size"] == -1 else how["group_size"])
    else:
        size_in = len(qweight) * 32 // bits
        columns = [_string([row[o] for row in qweight]) for o in range(size_out)]
        rows = [_string(row) for row in qzeros]
        mask, stored = 2**bits - 1, how["checkpoint_format"] == "gptq"
        q = [[columns[o] >> bits * i & mask for i in range(size_in)] for o in range(size_out)]
        z = [[(row >> bits * o & mask) + stored for row in rows] for o in range(size_out)]
        group = tensors["g_idx"].long()
    codes, zero = torch.tensor(q, dtype=torch.float64), torch.tensor(z, dtype=torch.float64)
    return (codes - zero[:, group]) * scales.T[:, group]


def _string(words: list[int]) -> int:
    """Words as one string of bits."""
    return sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
