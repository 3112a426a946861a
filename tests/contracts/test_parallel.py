"""What the training loop is promised of its processes, whether there is one or several. A new way to run in parallel is
a line of WAYS.

The checks run in every process: in this one, and in two that talk over gloo (`python test_parallel.py` each).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorakit.train.parallel import Parallel

ROWS, SIZE = 7, 3  # an odd number of rows: the shares of two processes differ


def rows() -> torch.Tensor:
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))


def check_ranks(parallel: Parallel) -> None:
    assert 0 <= parallel.rank < parallel.world
    assert parallel.is_first == (parallel.rank == 0)
    ranks = nn.functional.one_hot(torch.tensor(parallel.rank), parallel.world).float()
    assert (parallel.mean(ranks) * parallel.world).tolist() == [1.0] * parallel.world, "each rank once"


def check_share(parallel: Parallel) -> None:
    """Every row belongs to one process."""
    mine = torch.zeros(ROWS)
    mine[parallel.share(range(ROWS))] = 1
    assert (parallel.mean(mine) * parallel.world).tolist() == [1.0] * ROWS
    assert parallel.share([]) == []


def check_agree(parallel: Parallel) -> None:
    """The largest value reaches every process."""
    assert parallel.agree(10 + parallel.rank) == 10 + parallel.world - 1
    assert parallel.agree(0) == 0


def check_gradients(parallel: Parallel) -> None:
    """The gradients of shares, in two micro-batches, are those of the batch: d(Σ w·x)/dw = Σ x."""
    model = nn.Linear(SIZE, 1, bias=False)
    wrapped = parallel.wrap(model)
    own = rows()[parallel.share(range(ROWS))]
    parts = own.tensor_split(2)
    for i, part in enumerate(parts):
        with parallel.exchanging(wrapped, last=i + 1 == len(parts)):
            parallel.backward(wrapped(part).sum() * parallel.world / ROWS)  # gradients are averaged over processes
    gradient = model.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[0].double(), rows().double().mean(0), rtol=1e-5, atol=1e-6)


def check_wrap(parallel: Parallel) -> None:
    """The parameters that the optimizer has are those that are trained."""
    model = nn.Linear(SIZE, 1)
    assert {id(p) for p in parallel.wrap(model).parameters()} == {id(p) for p in model.parameters()}


CHECKS = (check_ranks, check_share, check_agree, check_gradients, check_wrap)


def check_all(parallel: Parallel) -> None:
    for check in CHECKS:
        check(parallel)
    parallel.wait()


def one_process() -> None:
    check_all(Parallel())


def two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error[-2000:]


WAYS = (one_process, pytest.param(two_processes, marks=pytest.mark.slow))


@pytest.mark.parametrize("run", WAYS)
def test_parallel_keeps_its_contract(run: Callable[[], None]):
    run()


if __name__ == "__main__":
    check_all(Parallel())
