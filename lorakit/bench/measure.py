"""How the benchmarks measure: sides in turn within one process, medians; bytes kept for backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

PRECISIONS = (torch.float32, torch.bfloat16)  # of the tables that measure in several


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
            alive.append(tensor.detach())
        return tensor.detach()  # with its node it would hold itself: a node keeps its own output in places

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
