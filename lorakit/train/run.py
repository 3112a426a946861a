"""One run: an adapter's parameters with their optimizer, schedule, early stop, and folder. The loop drives one or
several.

Everything random is a function of (seed, step), so a run that is killed and taken up again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import TrainError, listing
from ..io.atomic import write_text
from ..tasks.task import Item, weight_of
from . import compile, defaults, optimizer, resume, samples
from .early_stop import EarlyStop
from .report import write_report
from .run_folder import FREE
from .setup import Job
from .trackers import Trackers


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `adapter`: its folder (a model's, for full fine-tuning), or None if it was interrupted or
    failed.
    """

    adapter: Path | None
    step: int
    steps: int
    loss: float | None
    best_loss: float | None
    best_step: int | None
    seconds: float
    stopped: str | None  # "early", "failed", or the signal's name


class Shows(Protocol):
    """What shows a run while it goes on."""

    def row(self, row: dict[str, Any]) -> None: ...

    def sample(self, prompt: str, base: str, tuned: str) -> None: ...


class Run:
    """A run at some step. It knows nothing of other runs; the loop hands it gradients and says when to do what."""

    def __init__(self, job: Job, show: Shows):
        self.job, self.config, self.show = job, job.config, show
        self.parameters = resume.trainable(job.model, job.adapter)
        self.optimizer = optimizer.adamw(self.config, self.parameters, job.rate.value)
        self.early = EarlyStop(self.config.patience)
        self.best: dict[str, Tensor] = {}
        self.step, self.elapsed = 0, 0.0
        self.loss: float | None = None
        self.failed: str | None = None  # why it cannot go on
        self._resume()
        self.trackers = Trackers(self.config) if job.parallel.is_first else None
        self.prompts = job.task.prompts(self.config, job.base, job.data) if job.method.keeps_base else []
        self.base_answers: list[str] = []

    @property
    def ended(self) -> bool:
        return self.step >= self.job.steps or self.early.stop or self.failed is not None

    def batch(self) -> list[Item]:
        """The rows of the next step."""
        return self.job.batch(self.step)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def update(self, loss: float, norm: float, items: list[Item]) -> dict[str, Any]:
        """Clip by the gradients' norm, step; what there is to log."""
        rate = self.job.rate.value * optimizer.rate_factor(self.config, self.step, self.job.steps)
        optimizer.update(self.optimizer, self.parameters, rate, norm, self.config.clip)
        self.step += 1
        self.loss = loss
        return {
            "loss": round(loss, 5),
            "learning_rate": rate,
            "gradient_norm": round(norm, 5),
            self.job.task.unit: weight_of(items),
        }

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, what: str, value: float, items: list[Item]) -> TrainError:
        """The error for a loss or gradient that is not finite."""
        kept = resume.found(self.job.folder.checkpoints)
        saved = (
            f"the last good checkpoint is {self.job.folder.checkpoints}/step-{kept[-1]}"
            if kept
            else "no checkpoint had been written yet"
        )
        return TrainError(
            f"the {what} is {value} at step {self.step + 1}; nothing was updated, and {saved}\n"
            f"  rows of this batch: {listing([item.where for item in items], 16)}\n"
            f"  look at them, or try a lower learning rate (now {self.job.rate.value:g}), precision: fp32, or clip: 1"
        )

    @property
    def due_to_evaluate(self) -> bool:
        return self.step % defaults.evaluate_every(self.config, self.job.steps) == 0 or self.step == self.job.steps

    @property
    def due_to_save(self) -> bool:
        return self.step % defaults.save_every(self.config, self.job.steps) == 0 or self.ended

    def evaluate(self) -> None:
        """The loss on the held-out rows, and sample answers."""
        with compile.as_it_is() if self.config.compile else contextlib.nullcontext():
            self._evaluate()

    def _evaluate(self) -> None:
        self.job.method.activate(self.job.model, self.job.adapter)
        if self.job.held_out:
            measured = self.job.task.evaluate(self.job.base, self.job.held_out, self.config.batch_size)
            if self.early.better(next(iter(measured.values())), self.step):
                self.best = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
            self.log(
                {"step": self.step} | {f"held_out_{name}": _logged(name, value) for name, value in measured.items()}
            )
        if self.prompts and self.job.parallel.is_first:
            self._sample()

    def _sample(self) -> None:
        job = self.job
        if not self.base_answers:
            with job.method.base_alone(job.model):
                self.base_answers = job.task.samples(self.config, job.base, self.prompts)
        tuned = job.task.samples(self.config, job.base, self.prompts)
        samples.write(job.folder, self.step, self.prompts, self.base_answers, tuned)
        self.show.sample(self.prompts[0].text, self.base_answers[0], tuned[0])

    def save(self, together: bool = False) -> None:
        """A checkpoint. `together`: others save at this step too, and the one before stays until `prune`, when all have
        done so.
        """
        job = self.job
        state = {"early_stop": self.early.state(), "loss": self.loss, "seconds": self.elapsed, "steps": job.steps}
        state |= {"together": True} if together else {}
        keep = self.config.keep + together
        resume.save(job.folder.checkpoints, self.step, job.model, self.optimizer, self.best, state, keep, job.adapter)

    def prune(self) -> None:
        resume.prune(self.job.folder.checkpoints, self.config.keep)

    def _resume(self) -> None:
        job = self.job
        loaded = resume.load_newest(job.folder.checkpoints)
        if loaded is None:
            if job.parallel.is_first:
                job.folder.rewind(0)
            return
        resume.restore(loaded, job.model, self.optimizer, job.adapter)
        self.best, self.step, self.elapsed = loaded.best, loaded.state["step"], loaded.state["seconds"]
        self.loss = loaded.state["loss"]
        self.early = EarlyStop(self.config.patience, **loaded.state["early_stop"])
        if job.parallel.is_first:
            job.folder.rewind(self.step)
            self.prune()  # a kill may have come before its turn

    def finish(self) -> None:
        """Write the adapter: the parameters of the best held-out loss, or the last ones where nothing was held out."""
        job = self.job
        if self.failed is not None or not job.parallel.is_first:
            return
        if self.best:
            resume.put(self.best, self.parameters)
        job.method.save(job.model, job.base.processor, job.adapter, job.result, self._metadata())
        for name, text in job.data.files.items():
            write_text(job.result / name, text)
        write_report(job.folder, self.config)

    def _metadata(self) -> dict[str, Any]:
        """What travels with the adapter: nothing that depends on the clock, so that equal runs write equal files."""
        job = self.job
        return {
            "recipe": {k: v for k, v in self.config.model_dump(exclude_defaults=True).items() if k not in FREE},
            "data": {
                "name": Path(self.config.data).name,
                "hash": job.data_hash,
                "rows": len(job.train),
                **job.data.about,
            },
            "metrics": {"steps": self.step, "loss": self.loss, "held_out_loss": self.early.best_loss},
        }

    def result(self, interrupted: str | None = None) -> Result:
        """How it ended, or where the signal `interrupted` found it."""
        job = self.job
        if self.failed is not None:
            stopped: str | None = "failed"
        elif not self.ended:
            stopped = interrupted
        else:
            stopped = "early" if self.step < job.steps else None
        return Result(
            job.result if self.ended and self.failed is None else None,
            self.step,
            job.steps,
            self.loss,
            self.early.best_loss,
            self.early.best_step,
            self.elapsed,
            stopped,
        )

    def log(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl, to all who want it."""
        if self.job.parallel.is_first:
            self.job.folder.log(row)
            if self.trackers is not None:
                self.trackers.log(row)
            self.show.row(row)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()


def _logged(name: str, value: float) -> float | None:
    """A figure of an evaluation, as it is written down; JSON has no infinity."""
    return round(value, 5 if name == "loss" else 4) if math.isfinite(value) else None
