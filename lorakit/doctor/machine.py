"""Look at the machine: processor, cores and threads, devices and their memory, precisions, compiler, free disk."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.device import choose_device, choose_dtype, multiplies_bf16
from ..bases.limits import cpu_limit, memory_of

if TYPE_CHECKING:
    import torch

# Environment variables that set how many threads torch, OpenMP and BLAS use, and how idle threads wait.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_SPINCOUNT",
)
# Instruction sets that determine the speed of torch's CPU matmuls; names as in torch.cpu.get_capabilities().
_INSTRUCTIONS = (
    "avx2",
    "fma3",
    "f16c",
    "avx_vnni",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
)


@dataclass(frozen=True)
class Device:
    """A device that torch can use, and its memory in bytes. `used`: the one lorakit chooses."""

    kind: str
    name: str
    memory: int | None
    free: int | None
    used: bool


@dataclass(frozen=True)
class Precision:
    """Whether the device computes in a precision natively, and why. `used`: what --precision auto chooses."""

    name: str
    native: bool
    why: str
    used: bool


@dataclass(frozen=True)
class Threads:
    """How many threads torch uses, within and between operations, and what they have to share.

    cores: how many this process may run on. limit: CPU time that its cgroup allows, in cores. notes: what to change.
    """

    torch: int
    between_operations: int
    cores: int
    physical: int | None
    limit: float | None
    variables: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler that torch.compile needs on a CPU. `why`: what is missing, and the fix."""

    usable: bool
    path: str | None
    version: str | None
    why: str


@dataclass(frozen=True)
class Disk:
    """Free and total bytes of the disk that holds `what`."""

    what: str
    path: str
    free: int
    total: int
    writable: bool


@dataclass(frozen=True)
class Machine:
    """All facts. `kernels`: the instruction set that torch's CPU kernels use; ATEN_CPU_CAPABILITY can lower it."""

    devices: list[Device]
    precisions: list[Precision]
    kernels: str
    instructions: list[str]
    threads: Threads
    compiler: Compiler
    disks: list[Disk]


def look() -> Machine:
    """Collect the facts about this machine. Imports torch."""
    import torch

    has = torch.cpu.get_capabilities()
    instructions = [name for name in _INSTRUCTIONS if has.get(name)]
    kernels = torch.backends.cpu.get_cpu_capability()
    return Machine(devices(), precisions(), kernels, instructions, threads(), compiler(), disks())


def devices() -> list[Device]:
    """Return every GPU, then the CPU."""
    import torch

    chosen = choose_device().value
    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.device("cuda", index)
        used = chosen.type == "cuda" and index == torch.cuda.current_device()
        rows.append(_device(gpu, torch.cuda.get_device_name(gpu), used))
    if chosen.type not in ("cuda", "cpu"):
        rows.append(_device(chosen, chosen.type, True))
    rows.append(_device(torch.device("cpu"), cpu_name(), chosen.type == "cpu"))
    return rows


def precisions() -> list[Precision]:
    """Return fp32, bf16 and fp16 as the device that lorakit chooses supports them."""
    import torch

    device = choose_device().value
    chosen = choose_dtype("auto", device).value
    return [
        Precision("fp32", True, "supported everywhere", chosen == torch.float32),
        Precision("bf16", multiplies_bf16(device), _why_bf16(device), chosen == torch.bfloat16),
        Precision("fp16", *_fp16(device), chosen == torch.float16),
    ]


def threads() -> Threads:
    """Return how many threads a step uses, and whether that suits the machine."""
    import torch

    count, available, limit = torch.get_num_threads(), cores(), cpu_limit()
    physical = torch.cpu.get_capabilities().get("num_physical_cores")
    variables = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    notes = thread_notes(count, available, limit, variables)
    return Threads(count, torch.get_num_interop_threads(), available, physical, limit, variables, notes)


def thread_notes(count: int, available: int, limit: float | None, variables: dict[str, str]) -> list[str]:
    """Return what to change about `count` threads on `available` cores. limit: the cgroup's, in cores, or None."""
    notes = []
    usable = available if limit is None else max(1, min(available, round(limit)))
    if count > usable:
        share = f"{available} cores" if usable == available else f"{limit:g} cores of CPU time (cgroup)"
        notes.append(f"{count} threads share {share}, which is slow: export OMP_NUM_THREADS={usable}")
    elif count == 1 and usable > 1:
        fix = "unset OMP_NUM_THREADS" if variables.get("OMP_NUM_THREADS") == "1" else f"export OMP_NUM_THREADS={usable}"
        notes.append(f"only one thread runs on {usable} cores: {fix}, unless several runs share the machine")
    return notes


def compiler() -> Compiler:
    """Look for the C++ compiler that torch.compile would call, and for Python's headers, which its code includes."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    path = shutil.which(name)
    if path is None:
        fix = {"darwin": "xcode-select --install", "win32": "install the Build Tools for Visual Studio"}.get(
            sys.platform, "install one (Debian, Ubuntu: apt install g++), or name yours: export CXX=clang++"
        )
        return Compiler(False, None, None, f"there is no C++ compiler '{name}': {fix}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        fix = "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
        return Compiler(False, path, _version_line(path), f"{header} is missing: {fix}")
    return Compiler(True, path, _version_line(path), "")


def disks() -> list[Disk]:
    """Return the disks of the current folder, where runs are written, and of the Hugging Face cache."""
    return [_disk("the current folder", Path.cwd()), _disk("the Hugging Face cache", hub_cache())]


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder, by its own rules, as it may not be installed."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's model name."""
    file = Path("/proc/cpuinfo")
    return model_name(file.read_text(encoding="utf8").splitlines()) if file.exists() else platform.processor()


def model_name(lines: Iterable[str]) -> str:
    """Return the model name in /proc/cpuinfo, or the architecture if it has none, as on ARM."""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _device(device: torch.device, name: str, used: bool) -> Device:
    memory = memory_of(device)
    return Device(device.type, name, memory.total if memory else None, memory.free if memory else None, used)


def _why_bf16(device: torch.device) -> str:
    native = multiplies_bf16(device)
    if device.type == "cuda":
        return "compute capability 8.0 or newer" if native else "needs compute capability 8.0 (Ampere)"
    if device.type == "cpu":
        return "AVX512-BF16 or AMX" if native else "neither AVX512-BF16 nor AMX: half the memory of fp32, but slower"
    return f"supported by {device.type}"


def _fp16(device: torch.device) -> tuple[bool, str]:
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native = (major, minor) >= (5, 3)
        return native, f"compute capability {major}.{minor}{'' if native else ', needs 5.3'}; bf16 has the wider range"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        native = bool(has.get("amx_fp16") or has.get("avx512_fp16"))
        return (
            native,
            "AVX512-FP16 or AMX-FP16"
            if native
            else "neither AVX512-FP16 nor AMX-FP16: slower than fp32, and its range is narrow",
        )
    return True, f"supported by {device.type}"


def _version_line(path: str) -> str | None:
    """Return the first line of a program's --version, None if it fails."""
    try:
        process = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(process.stdout.splitlines()), None)


def _disk(what: str, path: Path) -> Disk:
    """Return the disk of `path` or, as the cache may not exist yet, of its nearest existing parent."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(existing)
    return Disk(what, str(path), usage.free, usage.total, os.access(existing, os.W_OK))
