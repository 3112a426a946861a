"""One training run: an adapter's parameters, optimizer, schedule, early stopping and folder. The loop drives the runs.

Everything random is a function of (seed, step), so a run that is killed and resumed ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import TrainError, listing
from ..io.atomic import write_text
from ..tasks.task import Item, weight_of
from . import compile, defaults, divergence, optimizer, resume
from .display import Display
from .early_stop import EarlyStop
from .ema import Ema
from .progress import facts
from .report import write_report
from .run_folder import FIXED, FREE, HELD_OUT, evaluated
from .samples import Sampler
from .setup import Job
from .trackers import Trackers


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `adapter`: its folder (a model's, for full fine-tuning); None if interrupted or failed.

    `step`, `steps`: steps taken and planned; `loss`: of the last step; `best_loss`, `best_step`: held-out; `seconds`:
    training time, over all starts.
    """

    adapter: Path | None
    step: int
    steps: int
    loss: float | None
    best_loss: float | None
    best_step: int | None
    seconds: float
    stopped: str | None  # "early", "failed", or the signal's name


class Run:
    """A run at some step, resumed from its newest checkpoint if there is one. It knows nothing of other runs."""

    def __init__(self, job: Job, display: Display):
        self.job, self.config, self.display = job, job.config, display
        self.parameters = resume.trainable(job.model, job.adapter)
        factors = job.rate_factors(self.parameters)
        self.optimizer = optimizer.build(self.config, job.model, self.parameters, job.rate.value, factors.__getitem__)
        self.ema = Ema(self.config.ema, self.parameters) if self.config.ema else None
        self.early = EarlyStop(self.config.patience)
        self.best: dict[str, Tensor] = {}
        self.step, self.elapsed = 0, 0.0
        self.loss: float | None = None
        self.penalty: Tensor | None = None  # of the step, added to its loss
        self.first_loss: float | None = None  # of the first step's batch: the base's
        self.base_loss: float | None = None  # on the held-out rows, computed when it is needed
        self.good_step: int | None = None  # of the last evaluation, if the run had not diverged
        self.warned = False  # that it has diverged
        self.failed: str | None = None  # why it cannot continue
        self.lengthened: list[dict[str, int]] = []  # {"at": step, "steps": the total planned until then}
        self._resume()
        self.trackers = Trackers(self.config) if job.parallel.is_first else None
        self.sampler = Sampler(job)
        self.evaluated = job.held_out or job.data.watched
        self.prefix = HELD_OUT if job.held_out else FIXED

    @property
    def ended(self) -> bool:
        """Whether no step is left: all taken, stopped early, or failed."""
        return self.step >= self.job.steps or self.early.stop or self.failed is not None

    def batch(self) -> list[Item]:
        """Return the rows of the next step."""
        return self.job.batch(self.step)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the parameters that have one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def update(self, loss: float, norm: float, items: list[Item], apart: Mapping[str, float]) -> dict[str, Any]:
        """Clip the gradients and take an optimizer step. Returns the metrics to log.

        `loss`: mean of the step; `norm`: of all gradients together; `items`: the step's rows; `apart`: further means to
        log, by name.
        """
        rate = self.job.rate.value * optimizer.rate_factor(self.config, self.step, self.job.steps)
        rates = optimizer.update(self.optimizer, self.parameters, rate, norm, self.config.clip)
        self.step += 1
        self.job.method.after_step(self.job.model, self.job.adapter, self.step, self.job.steps)
        if self.ema is not None:
            self.ema.update(self.step)
        self.loss = loss
        if self.step == 1:
            self.first_loss = loss
        return {
            "loss": round(loss, 5),
            **({} if self.penalty is None else {"penalty": round(float(self.penalty), 5)}),
            **{name: round(value, 5) for name, value in apart.items()},
            "learning_rate": rate,
            **{f"learning_rate_{label}": value for label, value in rates.items()},
            "gradient_norm": round(norm, 5),
            self.job.task.unit: weight_of(items),
        }

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def dead(self, loss: float, norm: float) -> TrainError | None:
        """Return the error for a step whose gradient is exactly zero although there is something to learn."""
        if self.config.diverged == "continue" or not divergence.is_dead(loss, norm):
            return None
        return TrainError(
            f"the gradient is exactly zero at step {self.step + 1}, with a loss of {loss:.4f}: the run has diverged, "
            f"or nothing that is trained affects the loss; nothing was updated, and {self._last_good()}\n"
            f"  {self._advice()}"
        )

    def _check_divergence(self, loss: float) -> None:
        """Raise TrainError if the held-out loss is far above the base's, unless `diverged` is "continue"."""
        if divergence.may_be_worse(loss, self.first_loss, self._margin(self.first_loss)):
            if self.base_loss is None:
                self.base_loss = self._held_out_loss_of_base()
            margin = self._margin(self.base_loss)
            if self.base_loss is not None and divergence.is_worse(loss, self.base_loss, margin):
                message = (
                    f"the run has diverged: at step {self.step} the held-out loss is {loss:.4f}, more than "
                    f"{margin:#.2g} above the base's, {self.base_loss:.4f}"
                )
                if self.config.diverged == "stop":
                    if self.job.parallel.is_first:
                        write_report(self.job.folder, self.config, self._facts)
                    raise TrainError(f"{message}; {self._last_good()}\n  {self._advice()}")
                if self.good_step is not None or not self.warned:
                    self.display.note(message)
                self.warned, self.good_step = True, None
                return
        self.good_step = self.step

    def _margin(self, loss: float | None) -> float:
        return self.job.task.margin(loss or 0.0)

    def _held_out_loss_of_base(self) -> float | None:
        if not self.job.method.keeps_base:
            return self.first_loss  # on the first batch, before anything was trained
        return next(iter(self._base_figures().values()))

    def _base_figures(self) -> dict[str, float]:
        job = self.job
        with job.method.base_alone(job.model):
            return job.task.evaluate(job.base, self.evaluated, job.micro_batch.value)

    def begin(self) -> None:
        """Evaluate the base before the first step, as step 0, if the task compares with it."""
        job = self.job
        if not (job.task.compares and job.method.keeps_base and self.evaluated):
            return
        logged = [row for row in job.folder.rows() if row["step"] == 0 and evaluated(row)]
        if not logged:
            logged = [{"step": 0} | self._named(self._base_figures())]
            self.log(logged[0])
        self.base_loss = logged[0][f"{self.prefix}loss"]

    def _last_good(self) -> str:
        """Say which checkpoint is the last from before the run diverged."""
        steps = resume.steps_in(self.job.folder.checkpoints)
        good = [step for step in steps if self.good_step is None or step <= self.good_step]
        if not good or (self.good_step is None and self.job.held_out):
            return "no checkpoint from before that had been written yet"
        return f"the last good checkpoint is {self.job.folder.checkpoints}/step-{good[-1]}"

    def _advice(self) -> str:
        return (
            f"try a lower learning rate (now {self.job.rate.value:g}) in another folder; to train on regardless: "
            "diverged=continue (--diverged continue)"
        )

    def not_finite(self, quantity: str, value: float, items: list[Item]) -> TrainError:
        """Build the error for a "loss" or "gradient" that is not finite. `items`: the step's rows."""
        steps = resume.steps_in(self.job.folder.checkpoints)
        saved = (
            f"the last good checkpoint is {self.job.folder.checkpoints}/step-{steps[-1]}"
            if steps
            else "no checkpoint had been written yet"
        )
        return TrainError(
            f"the {quantity} is {value} at step {self.step + 1}; nothing was updated, and {saved}\n"
            f"  rows of this batch: {listing([item.where for item in items], 16)}\n"
            f"  check these rows, or try a lower learning rate (now {self.job.rate.value:g}), precision: fp32, or "
            "clip: 1"
        )

    @property
    def due_to_evaluate(self) -> bool:
        """Whether to evaluate after this step."""
        return self.step % defaults.evaluate_every(self.config, self.job.steps) == 0 or self.step == self.job.steps

    @property
    def due_to_save(self) -> bool:
        """Whether to write a checkpoint after this step."""
        return self.step % defaults.save_every(self.config, self.job.steps) == 0 or self.ended

    def evaluate(self) -> None:
        """Evaluate on the held-out rows, keep the parameters if they are the best, and write samples."""
        with compile.uncompiled() if self.config.compile else contextlib.nullcontext(), self._averaged():
            self._evaluate()

    def _named(self, measured: Mapping[str, float]) -> dict[str, Any]:
        return {f"{self.prefix}{name}": _logged(name, value) for name, value in measured.items()}

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters are their averages, if the run has some."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_use()

    def _evaluate(self) -> None:
        self.job.method.activate(self.job.model, self.job.adapter)
        if self.evaluated:
            measured = self.job.task.evaluate(self.job.base, self.evaluated, self.job.micro_batch.value)
            self.log({"step": self.step} | self._named(measured))
            loss = next(iter(measured.values()))
            self._check_divergence(loss)
            # The loss of training rows would not say when to stop.
            if self.job.held_out and self.early.better(loss, self.step) and self.config.keep_best:
                self.best = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        sampled = self.sampler.take(self.step, self._save_result)
        if sampled is not None:
            path, base, tuned = sampled
            if base.text is None or tuned.text is None:
                self.display.drawn(self.step, path)
            else:
                self.display.sample(base.prompt, base.text, tuned.text)

    def save(self, together: bool = False) -> None:
        """Write a checkpoint.

        `together`: in a sweep, all runs save at this point, and each keeps its previous checkpoint until `prune`.
        """
        job = self.job
        state: dict[str, Any] = {
            "early_stop": self.early.state(),
            "loss": self.loss,
            "seconds": self.elapsed,
            "steps": job.steps,
            "first_loss": self.first_loss,
            "good_step": self.good_step,
            "best": bool(self.best),
            "ema": self.ema is not None,
        }
        state |= {"together": True} if together else {}
        state |= {"lengthened": self.lengthened} if self.lengthened else {}
        keep = self.config.keep + together
        resume.save(
            job.folder.checkpoints,
            self.step,
            job.model,
            self.optimizer,
            self.best,
            state,
            keep,
            job.adapter,
            self._save_averaged if job.method.keeps_base else None,  # else it would be the trained parameters again
            self.good_step,
            {} if self.ema is None else self.ema.values,
        )
        write_report(job.folder, self.config, self._facts)  # also of a run that is killed later

    def prune(self) -> None:
        """Delete all but the newest `keep` checkpoints, and the last one that is known to be good."""
        resume.prune(self.job.folder.checkpoints, self.config.keep, self.good_step)

    def _resume(self) -> None:
        job = self.job
        note = self.display.note if job.parallel.is_first else lambda text: None
        loaded = resume.load_newest(job.folder.checkpoints, note)
        if loaded is None:
            if job.parallel.is_first:
                job.folder.rewind(-1)  # the base's figures and samples too: its settings may differ now
            return
        resume.restore(loaded, job.model, self.optimizer, job.adapter)
        if self.ema is not None:
            self.ema.load(loaded.ema)
        self.best, self.step, self.elapsed = loaded.best, loaded.state["step"], loaded.state["seconds"]
        self.loss = loaded.state["loss"]
        self.first_loss, self.good_step = (loaded.state.get(name) for name in ("first_loss", "good_step"))
        self.early = EarlyStop(self.config.patience, **loaded.state["early_stop"])
        self.lengthened = list(loaded.state.get("lengthened", []))
        if loaded.state["steps"] < job.steps:
            job.steps_before = loaded.state["steps"]
            self.lengthened.append({"at": self.step, "steps": loaded.state["steps"]})
        if job.parallel.is_first:
            for lost in job.folder.rewind(self.step):
                note(lost)
            self.prune()  # the run may have been killed before it could

    def finish(self) -> None:
        """Save the adapter: the parameters with the best held-out loss, or the last ones without held-out rows."""
        job = self.job
        if self.failed is not None or not job.parallel.is_first:
            return
        if self.best:
            resume.put(self.best, self.parameters)
            self._save_result(job.result, self.early.best_step)
        else:
            self._save_averaged(job.result)
        write_report(job.folder, self.config, self._facts)

    @functools.cached_property
    def _facts(self) -> list[tuple[str, str]]:
        """What was chosen for the run and why, for its report."""
        return facts(self.job)

    def _save_averaged(self, folder: Path) -> None:
        """Write the adapter (or model) of this step into `folder`, of the averaged parameters if the run has some."""
        with self._averaged():
            self._save_result(folder)

    def _save_result(self, folder: Path, step: int | None = None) -> None:
        """Write the adapter (or model) as it is now into `folder`. `step`: that of its parameters; None: this one."""
        job = self.job
        metadata = self._metadata(self.step if step is None else step)
        write = functools.partial(job.task.save_adapter, self.config, job.base.processor)
        job.method.save(job.model, job.base.processor, job.adapter, folder, metadata, write)
        job.task.save_beside(self.config, job.base.processor, folder)
        for name, text in job.data.files.items():
            write_text(folder / name, text)

    def _metadata(self, step: int) -> dict[str, Any]:
        """Return the adapter's metadata; its metrics are those of `step`.

        It has nothing that depends on the clock, so equal runs write equal files.
        """
        job = self.job
        logged = {k: v for row in job.folder.rows() if row["step"] == step for k, v in row.items()}
        loss = self.loss if step == self.step else logged.get("loss")
        held_out = self.early.best_loss if step == self.early.best_step else logged.get("held_out_loss")
        return {
            "recipe": {k: v for k, v in self.config.model_dump(exclude_defaults=True).items() if k not in FREE},
            "data": {
                "name": Path(self.config.data).name,
                "hash": job.data_hash,
                "rows": len(job.train),
                **job.data.about,
            },
            "metrics": {"step": step, "loss": loss, "held_out_loss": held_out, "steps": self.step},
            **job.task.recorded(self.config, job.base.processor),
            **({"lengthened": self.lengthened} if self.lengthened else {}),
        }

    def result(self, interrupted: str | None = None) -> Result:
        """Return how the run ended. `interrupted`: the signal's name if one stopped it."""
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
        """Write a line to metrics.jsonl, to the trackers and to the display (in the first process)."""
        if self.job.parallel.is_first:
            self.job.folder.log(row)
            if self.trackers is not None:
                self.trackers.log(row)
            self.display.row(row)

    def close(self) -> None:
        """Close the trackers."""
        if self.trackers is not None:
            self.trackers.close()


def _logged(name: str, value: float) -> float | None:
    """Round a metric for metrics.jsonl; None if it is not finite, as JSON has no infinity."""
    return round(value, 5 if name.startswith("loss") else 4) if math.isfinite(value) else None
