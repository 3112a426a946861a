"""A tiny Llama in every format of quantized weights that a merge reads, and with the weights that they stand for."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import packed_checkpoints
import quantized
import torch
from torch import nn

import lorakit as lk
from lorakit.layers.bases import base_of

KINDS = ("nf4", "nf4-double", "fp4", "int8", "gptq", "gptq-order", "awq")
LIBRARY = ("nf4", "nf4-double", "fp4", "int8")  # of bitsandbytes


@functools.cache
def unquantized() -> Path:
    """The folder of the unquantized model."""
    folder = _folder("unquantized")
    quantized.llama().save_pretrained(folder)
    return folder


@functools.cache
def packed(kind: str) -> Path:
    """The folder of the quantized model, as the library writes it."""
    return _saved(kind)[0]


def dense(kind: str) -> nn.Module:
    """The model with the weights that the quantized ones stand for, in float32: by the library, or by hand."""
    model = quantized.llama()
    model.load_state_dict(_saved(kind)[1])
    return model


def load(folder: Path) -> nn.Module:
    """Load a folder as a user would; bitsandbytes does not repack its weights."""
    model = lk.load_base(folder, dtype="fp32", device="cpu")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapter(size: float = 0.05, model: nn.Module | None = None, **settings) -> lk.Adapter:
    """An adapter of the model with random factors of this size, trained on `model` (by default the unquantized one)."""
    model = quantized.llama() if model is None else model
    lk.attach(model, lk.LoraConfig(**{"rank": 4, "alpha": 8, "targets": "all-linear"} | settings))
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * size)
    return lk.capture(model)


def logits(model: nn.Module) -> torch.Tensor:
    """Its logits of a fixed row."""
    with torch.no_grad():
        return model(torch.arange(1, 20)[None]).logits.float()


@functools.cache
def _saved(kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = _folder(kind)
    if kind not in LIBRARY:
        how = (
            packed_checkpoints.awq_config()
            if kind == "awq"
            else packed_checkpoints.gptq_config(desc_act=kind == "gptq-order", sym=kind != "gptq-order")
        )
        _, model = packed_checkpoints.save(folder, how)
        return folder, model.state_dict()
    if kind == "int8":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how8 = BitsAndBytesConfig(load_in_8bit=True)
        loaded = AutoModelForCausalLM.from_pretrained(unquantized(), quantization_config=how8).eval()
    else:
        options = {"bnb_4bit_compute_dtype": torch.float32}
        loaded = quantized.in_4_bits(unquantized(), kind == "nf4-double", kind.removesuffix("-double"), **options)
    loaded.save_pretrained(folder)
    model = quantized.llama()
    weights = dict(model.state_dict())
    for name, module in loaded.named_modules():
        if hasattr(module, "weight") and base_of(module).quantization is not None:
            weights[f"{name}.weight"] = base_of(module).dense(module).float()
    return folder, weights


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _folder(name: str) -> Path:
    return Path(_root().name) / name
