"""The batches of a run, and the first of them for adapters whose start is made from data (`LoraConfig.init`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..config import LoraSettings, part
from ..data.batches import batch_order
from ..data.dataset import groups_of, sizes_of
from ..methods.method import StartData
from ..tasks import task_of
from ..tasks.task import Base, Data, Item
from . import defaults, resume
from .config import TrainConfig
from .micro import Limit, micro_batches
from .parallel import Parallel
from .run_folder import RunFolder


def epoch_batches(config: TrainConfig, data: Data, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, as indices of the training items. They depend on the seed and the epoch alone."""
    rows = data.epoch(config.seed, epoch)
    sizes, groups = sizes_of(data.train), groups_of(data.train)
    order = batch_order(
        [sizes[i] for i in rows],
        config.batch_size,
        config.seed,
        epoch,
        config.group_by_length,
        None if groups is None else [groups[i] for i in rows],
    )
    return [[rows[i] for i in batch] for batch in order]


def start_data(base: Base, data: Data, parallel: Parallel) -> StartData:
    """Return what a start may be made from. A run's first batches are the same whenever it is started.

    `base`: with the run's config.
    """
    config: TrainConfig = base.config
    task = task_of(config.task)

    def batches() -> Iterator[dict[str, Any]]:
        task.prepare(base, data.train)
        longest = max(sizes_of(data.train))
        rows = defaults.micro_batch(config, longest, parallel.device, parallel.world).value
        for batch in epoch_batches(config, data, 0)[: part(config, LoraSettings).init_batches]:
            items: list[Item] = [task.drawn(data.train[i], config.seed, 0) for i in batch]
            for micro in micro_batches([items], Limit([rows], None, None, 0)):
                yield task.collate(micro.items, base, packed=task.packs(config))

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the sum over all trained positions, so that each counts equally."""
        return task.losses(model, batch).sum()

    return StartData(batches, loss, resume.newest_ranks(RunFolder(config.out).checkpoints))
