"""Choose the device and precision that a model runs in, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Choice
from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

DEVICES = ("cuda", "xpu", "mps", "cpu")
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


def device_named(name: str | torch.device) -> torch.device:
    """Return a device by its name, such as "cuda:1". Raises ConfigError for one that is unknown, or not here."""
    import torch

    kind = str(name).partition(":")[0]
    try:
        device = torch.device(name)
        backend = torch.get_device_module(device)
    except (RuntimeError, TypeError) as error:
        hint = "; did you mean 'cuda'?" if kind.lower() == "gpu" else did_you_mean(kind.lower(), DEVICES)
        raise ConfigError(
            f"device: there is no device '{name}'{hint}\n  expected {', '.join(DEVICES)}, or one of several: cuda:0"
        ) from error
    count = backend.device_count() if backend.is_available() else 0
    if count <= (device.index or 0):
        found = f"its number is at most {count - 1}" if count else f"torch finds no {kind} here"
        raise ConfigError(
            f"device: {name} cannot be used: {found}\n"
            f"  omit device for what is here, {choose_device().value}; or install a torch that supports the device"
        )
    return device


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


def precision_named(dtype: torch.dtype) -> str:
    """Return the name in `PRECISIONS` of a dtype, or the dtype's own."""
    own = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(own, own)


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
