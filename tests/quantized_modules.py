"""Linears as torchao, quanto, HQQ, compressed-tensors, gptqmodel and lorakit quantize them, of a given weight."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import packed_checkpoints as checkpoints
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases.own_linear import AwqLinear, FrozenQuantLinear, GptqLinear, settings_of
from lorakit.ops.quantized import gptq


def plain(W: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(W.shape[1], W.shape[0], bias is not None).requires_grad_(False)
    module.weight.copy_(W)
    if bias is not None:
        module.bias.copy_(bias)
    return module.eval()


def installed(name: str, extra: str = "test") -> Any:
    """Import a library, or skip."""
    hint = f"pip install 'lorakit[{extra}]'" if extra else f"pip install {name}: it is built from source"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torchao").setLevel(logging.ERROR)  # that it cannot load its kernels for GPUs
        return pytest.importorskip(name, reason=f"{name} is not installed: {hint}", exc_type=ImportError)


def torchao(W: Tensor, bias: Tensor | None, kind: str = "int8") -> nn.Module:
    library = installed("torchao.quantization")
    configs = {
        "int8": library.Int8WeightOnlyConfig,
        "intx4": lambda: library.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=library.granularity.PerGroup(32)
        ),
        "float8": library.Float8WeightOnlyConfig,
        "int8, activations too": library.Int8DynamicActivationInt8WeightConfig,
    }
    held = nn.Sequential(plain(W, bias))
    library.quantize_(held, configs[kind]())
    return held[0]


def quanto(W: Tensor, bias: Tensor | None, kind: str = "qint8", activations: str | None = None) -> nn.Module:
    library = installed("optimum.quanto")
    held = nn.Sequential(plain(W, bias))
    library.quantize(held, weights=getattr(library, kind), activations=activations and getattr(library, activations))
    library.freeze(held)
    return held[0].requires_grad_(False)


def hqq(W: Tensor, bias: Tensor | None, bits: int = 4, axis: int = 1) -> nn.Module:
    library = installed("hqq.core.quantize", extra="")
    how = library.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    return library.HQQLinear(plain(W, bias), how, compute_dtype=torch.float32, device="cpu").eval()


def compressed(W: Tensor, bias: Tensor | None, bits: int = 4, kind: str = "int", decompress: bool = True) -> nn.Module:
    """In groups of 32 with four bits, else by rows. `decompress`: as it is after the model's first forward."""
    installed("compressed_tensors")
    from compressed_tensors.compressors.base import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    size = 32 if bits == 4 else W.shape[1]
    strategy = {"strategy": "group", "group_size": size} if bits == 4 else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=True, **strategy)
    module = plain(W, bias)
    initialize_module_for_quantization(module, QuantizationScheme(targets=["Linear"], weights=args), True)
    highest = 448 if kind == "float" else 2 ** (bits - 1) - 0.5
    largest = W.view(W.shape[0], -1, size).abs().amax(2)
    module.weight_scale.data = (largest / highest).reshape(module.weight_scale.shape)
    compress_module(module)
    if decompress:
        decompress_module(module)
    return module.requires_grad_(False)


def packed(W: Tensor, bias: Tensor | None, how: dict[str, Any], was_conv1d: bool = False) -> FrozenQuantLinear:
    """lorakit's own, of a weight [out, in]."""
    tensors = checkpoints.packed(W, how) | ({} if bias is None else {"bias": bias.clone()})
    kind = {"gptq": GptqLinear, "awq": AwqLinear}[how["quant_method"]]
    return kind(tensors, settings_of(how, tensors, W.shape[1]), was_conv1d).eval()


def gptqmodel(W: Tensor, bias: Tensor | None) -> nn.Module:
    return TorchAtenLinear(W, bias)


class TorchAtenLinear(nn.Module):
    """Does what gptqmodel's class of this name does: a first input that needs no gradients has the weight repacked, and
    from then on nothing passes gradients.
    """

    def __init__(self, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.group_size, (self.out_features, self.in_features) = 4, 32, W.shape
        for name, tensor in gptq.quantized(W, gptq.Settings(4, 32, plus_one=False)).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.linear_mode: str | None = None
        self.training = False

    def qzero_format(self) -> int:
        return 2

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not x.requires_grad and self.linear_mode is None:
            self.linear_mode = "inference"
            self.kernel = self._dequantized()
            self.qweight = self.qweight.T.contiguous()
        elif self.linear_mode is None:
            self.linear_mode = "train"
        if self.linear_mode == "inference":
            with torch.no_grad():
                return F.linear(x, self.kernel, self.bias)
        return F.linear(x, self._dequantized(), self.bias)

    def _dequantized(self) -> Tensor:
        return gptq.dequantized(dict(self.named_buffers()), gptq.Settings(4, 32, plus_one=False))


class StrangeQuantLinear(nn.Module):
    """A quantized linear of a library that lorakit does not know."""

    def __init__(self, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.register_buffer("codes", (W * 100).round().to(torch.int8))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) / 100, self.bias)
