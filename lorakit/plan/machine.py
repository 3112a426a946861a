"""The memory of a training process besides the model, and this machine's matrix-product rate."""

from __future__ import annotations

import time

import torch

# Bytes of a training process before the base is loaded, and what code and kernel buffers add during the first steps
# (torch 2.13 for CPUs: 400 and 42 MB, python -m lorakit.bench.plan). A torch built for CUDA needs more.
PROCESS, KERNELS = 400_000_000, 42_000_000
LIBRARIES = {"bitsandbytes": 45_000_000}  # what a quantizer's library adds when it is imported, measured likewise
# The CUDA context with cuBLAS's workspace, in the device's memory: an estimate, not measured.
CUDA_CONTEXT = 600_000_000


def overhead(device: torch.device, held: int = PROCESS) -> int:
    """Return the bytes of the device that Python, torch and its kernels take.

    held: what the process holds before the base is loaded.
    """
    return CUDA_CONTEXT if device.type == "cuda" else held + KERNELS


def multiply_rate(dtype: torch.dtype, device: torch.device, width: int = 1024, seconds: float = 0.2) -> float:
    """Return the floating-point operations a second of [width, width] matrix products: the best within `seconds`."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best, began = 0.0, time.perf_counter()
    a @ b
    while not best or time.perf_counter() - began < seconds:  # at least one, however busy the machine is
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * width**3 / (time.perf_counter() - start))
    return best
