"""Find which ways of quantizing a base this machine can use, by multiplying a small linear quantized with each."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..bases.device import choose_device
from ..bases.quantize import PACKAGES, READERS, is_installed
from ..config import QUANTIZERS

SIZE = 64  # of the linear: one block


@dataclass(frozen=True)
class Quantizer:
    """A way of storing a base's weights. `name`: the value of --quantize, or how checkpoints are called.

    loads: whether lorakit quantizes to it while loading; why: what it uses, or what is missing, with the fix.
    """

    name: str
    loads: bool
    usable: bool
    why: str


def quantizers() -> list[Quantizer]:
    """Return every value of --quantize, then what quantized checkpoints can be read."""
    device = choose_device().value
    found = [_tried(name, device) for name in QUANTIZERS]
    found.append(Quantizer("GPTQ, AWQ checkpoints", False, True, "read by lorakit itself, in plain torch"))
    for name in ("hqq", "quanto", "compressed-tensors"):
        package, install = READERS[name]
        here = is_installed(package)
        why = package if here else f"{package} is not installed: {install}"
        found.append(Quantizer(f"{name} checkpoints", False, here, why))
    return found


def _tried(name: str, device: torch.device) -> Quantizer:
    package, install = PACKAGES[name]
    if not is_installed(package):
        return Quantizer(name, True, False, f"{package} is not installed: {install}")
    try:
        with _quietly():
            error = _error(name, device)
    except Exception as failed:  # a broken library may raise anything; doctor has to report it, not crash
        return Quantizer(name, True, False, f"{package} fails on {device.type}: {type(failed).__name__}: {failed}")
    if error > 0.2:
        return Quantizer(name, True, False, f"{package} computes something else on {device.type}: off by {error:.0%}")
    return Quantizer(name, True, True, f"{package}, on {device.type}")


def _error(name: str, device: torch.device) -> float:
    """Quantize a linear, multiply by it, and return the relative error of the result. (The coarsest, fp4: 0.12.)"""
    made = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(SIZE, SIZE, generator=made) for _ in range(2))
    with torch.no_grad():
        exact, got = x @ weight.T, _linear(name, weight, device)(x.to(device)).cpu()
    return float((got - exact).norm() / exact.norm())


def _linear(name: str, weight: torch.Tensor, device: torch.device) -> nn.Module:
    module: nn.Module
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        module = nn.Linear(SIZE, SIZE, bias=False)
        module.weight.data = weight
        quantize_(module.to(device), Int8WeightOnlyConfig(set_inductor_config=False))
        return module
    import bitsandbytes

    if name == "int8":
        module = bitsandbytes.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
    else:
        module = bitsandbytes.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.float32, quant_type=name)
    module.weight.data = weight
    return module.to(device)  # quantizes


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide what the libraries print and log when they are imported: kernels for other devices that do not load."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
