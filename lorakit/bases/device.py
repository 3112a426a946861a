"""Choose the device and precision that a model runs in, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Choice
from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_NAMES = {"cuda": "the GPU", "cpu": "the CPU"}


def choose_device() -> Choice:
    """Return the first of cuda, xpu and mps that is available, else the CPU, and why."""
    import torch

    if torch.cuda.is_available():
        return Choice(torch.device("cuda"), torch.cuda.get_device_name())
    for name in ("xpu", "mps"):
        backend = getattr(torch, name, None) or getattr(torch.backends, name)
        if backend.is_available():
            return Choice(torch.device(name), f"torch found {name}")
    return Choice(torch.device("cpu"), "no accelerator found")


def choose_dtype(precision: str, device: torch.device) -> Choice:
    """Return the base's precision and why: as given, or for "auto" bf16 if the hardware multiplies it, else float32.

    Raises ConfigError for an unknown precision.
    """
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in dtypes:
        return Choice(dtypes[precision], "as given")
    if precision != "auto":
        hint = did_you_mean(precision, PRECISIONS)
        raise ConfigError(f"unknown precision '{precision}'{hint}\n  known: {', '.join(PRECISIONS)}")
    if multiplies_bf16(device):
        return Choice(torch.bfloat16, f"{_NAMES.get(device.type, device.type)} multiplies bf16")
    return Choice(torch.float32, "the GPU has no bf16" if device.type == "cuda" else "the CPU has no bf16 arithmetic")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic in hardware, so that torch does not emulate it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True  # mps, xpu


def peak_memory() -> int:
    """Return this process's peak resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its getrusage includes the parent's peak from before exec
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # a dependency of accelerate

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
