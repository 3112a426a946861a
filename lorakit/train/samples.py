"""Take samples during training, of the base and of the tuned model, and write them into `samples/`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..tasks.task import Sample
from .setup import Job


class Sampler:
    """A run's prompts, and the base's samples, which are taken once."""

    def __init__(self, job: Job):
        self.job = job
        self.prompts: Sequence[Any] = []
        if job.method.keeps_base and job.parallel.is_first:
            self.prompts = job.task.prompts(job.config, job.base, job.data)
        self.base: list[Sample] = []

    def take(self, step: int, save: Callable[[Path], None]) -> tuple[Path, Sample, Sample] | None:
        """Sample from every prompt. Returns the file, and the first prompt's samples; None without prompts.

        `save`: writes the result as it is now into a folder.
        """
        job, task = self.job, self.job.task
        if not self.prompts:
            return None
        self.base = self.base or task.base_samples(job.folder.samples, job.config, job.base, self.prompts)
        if not self.base:
            with job.method.base_alone(job.model):
                self.base = task.samples(job.config, job.base, self.prompts)
        if task.samples_from_file(job.config):
            with tempfile.TemporaryDirectory(prefix="lorakit-sample-") as folder:
                save(Path(folder) / "result")
                with job.method.reloaded(job.model, Path(folder) / "result"):
                    tuned = task.samples(job.config, job.base, self.prompts)
        else:
            tuned = task.samples(job.config, job.base, self.prompts)
        return task.write_samples(job.folder.samples, step, self.base, tuned), self.base[0], tuned[0]
