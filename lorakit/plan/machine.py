"""Measure this machine: its total and free memory, this process's memory, and its matrix-product rate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Bytes of a training process before the base is loaded, and what code and kernel buffers add during the first steps
# (torch 2.13 for CPUs: 365 and 42 MB, python -m lorakit.bench.plan). A torch built for CUDA needs more.
PROCESS, KERNELS = 365_000_000, 42_000_000
# The CUDA context with cuBLAS's workspace, in the device's memory: an estimate, not measured.
CUDA_CONTEXT = 600_000_000
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Memory:
    """`total`: bytes of the device, or this process's cgroup limit; `free`: bytes available now; `source`: which."""

    total: int
    free: int
    source: str


def memory_of(device: torch.device) -> Memory | None:
    """Return the device's memory, None if it is unknown or the device is not here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None  # a plan for a GPU on a machine without one
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free, torch.cuda.get_device_name(device))
    if device.type not in ("cpu", "mps"):
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return _without_proc()
    known = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = known["MemTotal"], known.get("MemAvailable", known["MemFree"]) + resident()
    limit = _group_limit()
    if limit < total:
        return Memory(limit, min(limit, free), "this process's group (cgroup)")
    return Memory(total, min(free, total), "this machine")


def resident() -> int:
    """Return this process's resident memory in bytes, 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def overhead(device: torch.device, held: int = PROCESS) -> int:
    """Return the bytes that Python, torch and its kernels need on the device.

    `held`: bytes of the process before the base is loaded.
    """
    return CUDA_CONTEXT if device.type == "cuda" else held + KERNELS


def multiply_rate(dtype: torch.dtype, device: torch.device, width: int = 1024, seconds: float = 0.2) -> float:
    """Measure the FLOP/s of [width, width] matrix products: the best of those that run within `seconds`."""
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


def cpu_limit() -> float | None:
    """Return the CPU limit of this process's cgroups in cores, None if there is no limit."""
    limits = []
    for text in _group_files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, _, period = text.partition(" ")
        if quota.isdigit():  # "max", or -1 in v1: no limit
            # v1 has the period in a separate file, which practically always contains the default
            limits.append(int(quota) / int(period or 100_000))
    return min(limits, default=None)


def _group_limit() -> int:
    """Return the lowest memory limit of this process's cgroups in bytes, `_UNLIMITED` if there is none."""
    return min(
        (int(text) for text in _group_files("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()),
        default=_UNLIMITED,
    )


def _group_files(controller: str, name: str, name_v1: str) -> Iterator[str]:
    """Yield a cgroup setting's values (v2: `name`, v1: `name_v1`) from this process's own cgroup up to the root."""
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf8").splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        at, file_name = (root / controller, name_v1) if controllers else (root, name)
        folder = at / path.lstrip("/")
        for each in (folder, *folder.parents):
            file = each / file_name
            if file.is_file():
                yield file.read_text(encoding="ascii").strip()
            if each == at:
                break


def _without_proc() -> Memory | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    return Memory(total, total, "this machine")
