"""What this process may use of the machine: memory and processor time, with the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Memory:
    """Bytes. total: of the device, or the limit of this process's control group. free: with what this process holds."""

    total: int
    free: int
    source: str


def memory_of(device: torch.device) -> Memory | None:
    """Return the device's memory; None if it is not known."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None  # a plan for another machine
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
    """Return the resident bytes of this process; 0 if they are not known."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def cpu_limit() -> float | None:
    """Return the processor time that this process's control groups allow, in cores; None without a limit."""
    limits = []
    for text in _group_files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, _, period = text.partition(" ")
        if quota.isdigit():  # "max", or -1 in v1: no limit
            # v1 has the period in another file, which is left at its default in practice
            limits.append(int(quota) / int(period or 100_000))
    return min(limits, default=None)


def _group_limit() -> int:
    """Return the lowest memory limit, in bytes, of the control groups that this process is in."""
    return min(
        (int(text) for text in _group_files("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()),
        default=_UNLIMITED,
    )


def _group_files(controller: str, name: str, name_v1: str) -> Iterator[str]:
    """Yield a setting's values in the control groups (v2, v1) of this process, from its own group up to the root."""
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
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    return Memory(total, total, "this machine")
