"""Train one adapter: set up, run the loop, write the adapter."""

from __future__ import annotations

import contextlib

from ..config import Choice
from .config import TrainConfig
from .interrupt import catching_signals
from .loop import Loop
from .progress import Progress
from .run import Result, Run
from .setup import set_up
from .task_of_data import with_task


def train(config: TrainConfig, progress: Progress | None = None) -> Result:
    """Train one adapter, or resume its run. After a LorakitError the last good checkpoint is still there.

    Raises WriteError if another process is training in the same folder.
    """
    progress = progress or Progress()
    config = with_task(config)
    search = None
    if config.find_lr:
        from .sweep.find_lr import find  # imported here, since it uses this loop too

        search = find(config, progress)
        config = config.replace(learning_rate=search.rate, find_lr=False)
    with contextlib.ExitStack() as held:
        job = set_up(config, held)
        if search is not None:
            job.rate = Choice(job.rate.value, "found by find_lr")
            search.keep(job.folder)
        loop = Loop([Run(job, progress)])
        with contextlib.closing(loop), contextlib.closing(progress), catching_signals() as interrupt:
            progress.start(job, loop.runs[0].step)
            return loop.go(interrupt)[0]
