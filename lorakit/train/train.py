"""Train one adapter: set up, run the loop, write the adapter."""

from __future__ import annotations

import contextlib

from ..config import Choice
from .config import TrainConfig
from .interrupt import listening
from .loop import Loop
from .progress import Progress
from .run import Result, Run
from .setup import set_up


def train(config: TrainConfig, progress: Progress | None = None) -> Result:
    """Train one adapter as `config` says; see `Result`. Raises LorakitError, having kept the last good checkpoint."""
    progress = progress or Progress()
    found = None
    if config.find_lr:
        from .sweep.find_lr import find  # which trains with this loop

        found = find(config, progress)
        config = config.replace(learning_rate=found.rate, find_lr=False)
    job = set_up(config)
    if found is not None:
        job.rate = Choice(job.rate.value, "found by trial")
        found.keep(job.folder)
    with contextlib.closing(Loop([Run(job, progress)])) as loop, contextlib.closing(progress), listening() as interrupt:
        progress.start(job, loop.runs[0].step)
        return loop.go(interrupt)[0]
