"""Which device and which precision a model runs in, and why."""

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
    """cuda, xpu or mps where there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return Choice(torch.device("cuda"), torch.cuda.get_device_name())
    for name in ("xpu", "mps"):
        backend = getattr(torch, name, None) or getattr(torch.backends, name)
        if backend.is_available():
            return Choice(torch.device(name), f"torch found {name}")
    return Choice(torch.device("cpu"), "no accelerator found")


def choose_dtype(precision: str, device: torch.device) -> Choice:
    """The base's precision: as asked, or bf16 where the hardware multiplies it and float32 elsewhere."""
    import torch

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in named:
        return Choice(named[precision], "as asked")
    if precision != "auto":
        raise ConfigError(f"unknown precision '{precision}'{did_you_mean(precision, PRECISIONS)}\n  known: {', '.join(PRECISIONS)}")
    if multiplies_bf16(device):
        return Choice(torch.bfloat16, f"{_NAMES.get(device.type, device.type)} multiplies bf16")
    return Choice(torch.float32, "the GPU has no bf16" if device.type == "cuda" else "the CPU has no bf16 arithmetic")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 arithmetic, rather than torch emulating it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True  # mps, xpu


def peak_memory() -> int:
    """The most main memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage also counts what the parent held before it became this program
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # which accelerate brings

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
