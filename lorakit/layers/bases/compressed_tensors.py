"""Weights quantized by compressed-tensors (llm-compressor's format): an nn.Linear that carries a `quantization_scheme`.

As loaded, its weight is compressed: "weight_packed" with 4 bits, or "weight" in int8 or float8, beside "weight_scale".
A hook of the library decompresses all weights of the model in its first forward, and leaves them so. lorakit reads
either state; both compute with the same values.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, QuantizedWeight, refuse_activations


class CompressedTensors(QuantizedWeight):
    """A linear with a scheme for its weight, compressed or not."""

    quantization: ClassVar[str | None] = "compressed-tensors"

    def owns(self, module: nn.Module) -> bool:
        scheme = module.__dict__.get("quantization_scheme")
        return (
            isinstance(module, nn.Linear)
            and scheme is not None
            and getattr(scheme, "weights", None) is not None
            and "weight_scale" in module._parameters
        )

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in module._parameters if name != "bias")  # scales and the like beside the weight

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module._parameters["weight_scale"].dtype
        return dtype

    def device(self, module: Any) -> torch.device:
        device: torch.device = module._parameters["weight_scale"].device
        return device

    def dense(self, module: Any) -> Tensor:
        weight, scale = module._parameters.get("weight"), module._parameters["weight_scale"]
        if weight is not None and weight.dtype == scale.dtype:
            return weight.detach()
        tensors = {n: p.detach() for n, p in (*module._parameters.items(), *module._buffers.items()) if p is not None}
        decompressed: Tensor = _compressor(module.quantization_scheme).decompress(tensors, module.quantization_scheme)[
            "weight"
        ]
        return decompressed.detach()

    def sample(self, module: Any, at: Tensor) -> tuple[Tensor, Tensor]:
        at, W = at.to(self.device(module)), self.dense(module).float()
        (size_out, size_in), values = W.shape, W.flatten()[at]
        scale, args = module._parameters["weight_scale"].float().abs(), module.quantization_scheme.weights
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale  # per tensor or row; per block or group
        rows, columns = (-(-size // count) for size, count in zip((size_out, size_in), scale.shape, strict=True))
        step = scale[at // size_in // rows, at % size_in // columns]
        if str(getattr(args.type, "value", args.type)) == "float":
            mantissa = 2.0 ** (-4 if args.num_bits == 8 else -2)  # half the distance between adjacent numbers
            return values, values.abs() * mantissa + step * mantissa
        return values, step / 2

    def check(self, module: Any, name: str, trainable: bool) -> None:
        scheme = module.quantization_scheme
        if trainable and (scheme.input_activations or scheme.output_activations):
            refuse_activations(name, self.quantization)


def _compressor(scheme: Any) -> Any:
    library: Any = sys.modules["compressed_tensors.compressors.base"]
    formats: Any = sys.modules["compressed_tensors.compressors.format"]
    form = scheme.format or formats.infer_module_format(nn.Linear, scheme)
    return library.BaseCompressor.get_value_from_registry(getattr(form, "value", form))


KINDS: tuple[BaseWeight, ...] = (CompressedTensors(),)
