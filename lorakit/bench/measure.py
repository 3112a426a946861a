"""How the benchmarks measure: sides in turn within one process, medians, ratios; bytes kept for backward; a child's peak memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int = 7, warm: int = 2) -> dict[str, float]:
    """Seconds of each side: the median of `rounds`, the sides run one after the other in each, after `warm` rounds not counted.

    Interleaving makes a machine that is slow for a while slow for all sides alike.
    """
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warm):
        for name, run in sides.items():
            _wait()
            began = time.perf_counter()
            run()
            _wait()
            if turn >= warm:
                spent[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in spent.items()}


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between a forward and its backward, each storage once, without the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


# A small process in between: Linux counts what a process held before it started another into the other's peak, and this one may hold much.
_LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


def child_peak(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command run as a process of its own. RuntimeError with its last words if it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _LAUNCH, *command], capture_output=True, text=True)
    code, peak = (int(word) for word in done.stdout.split())
    if code:
        raise RuntimeError(f"{' '.join(command)} failed ({code}):\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, peak * 1024


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
